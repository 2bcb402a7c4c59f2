"""Text that people read: counted nouns with the right singular and plural."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun in the right form: "1 slice", "2 slices", "3 classes".

    plural: the form for every number but 1; by default `noun` with "es" after s, x, z, ch and sh,
    with "ies" for a consonant and y, else with "s".
    """
    if plural is None:
        if noun.endswith(("s", "x", "z", "ch", "sh")):
            plural = f"{noun}es"
        elif noun.endswith("y") and noun[-2] not in "aeiou":
            plural = f"{noun[:-1]}ies"
        else:
            plural = f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
