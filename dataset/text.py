"""Text that people read: counted nouns, names made safe to print, cells made safe in CSV files."""

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


def printable(text: object, keep: str = "") -> str:
    r"""`text` with characters that control a terminal or hide others written as escapes (\x1b).

    Those are control characters, line breaks, invisible and direction marks, and bytes of file
    names that are not UTF-8. keep: characters that stay, such as line breaks in longer texts.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def csv_cell(value: object) -> str:
    """A value for a CSV file that spreadsheets read as text or a number, never as a formula.

    A text that starts with = + - @ gets an apostrophe before it; numbers stay numbers.
    """
    text = printable(value)
    if isinstance(value, int | float) or not text.startswith(("=", "+", "-", "@")):
        return text
    return f"'{text}"
