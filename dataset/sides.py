"""Left and right classes: which ids are swapped when a patient is mirrored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
# Chambers of the heart are no mirror images of each other: a mirrored left one still looks as one.
HEART = {"ventricle", "ventricular", "atrium", "atrial"}
MIN_STEM = 3  # letters beside a joined l or r: "lkid" has a side, "LV" and "RA" are the heart's
JOINED = ("left", "right"), ("right", "left"), ("l", "r"), ("r", "l")  # "lkidney", "kidneyright"


class Sides(NamedTuple):
    """How mirroring changes class ids.

    ids: the id of each class in a mirrored patient, its own where its name has no side.
    unpaired: names of classes with a side whose other side is not in the table.
    """

    ids: tuple[int, ...]
    unpaired: tuple[str, ...]

    @property
    def any(self) -> bool:
        """Whether any class has a side."""
        return bool(self.unpaired) or self.ids != tuple(range(len(self.ids)))


def sides(classes: Sequence[str]) -> Sides:
    """The sides that class names state: "left kidney", "KidneyLeft", "femur r", "rkid" with "lkid".

    classes: one name per id, background first. Case and separators do not matter. A side that is
    joined to its word counts only where the table has the other side as well. Chambers of the heart
    count as classes without a side.
    """
    words = [_words(name) for name in classes]
    others = [_other_side(number, words) for number in range(len(words))]
    ids, unpaired = [], []
    for number, other in enumerate(others):
        paired = other is not None and others[other] == number  # and no third of the same name
        ids.append(other if paired else number)
        unpaired += [] if paired else [classes[number]]
    return Sides(tuple(ids), tuple(unpaired))


def _words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case; "KidneyLeft" has two, and a number belongs to its word."""
    apart = re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])", " ", name)
    return tuple(re.findall(r"[^\W_]+", apart.lower()))


def _other_side(number: int, words: Sequence[tuple[str, ...]]) -> int | None:
    """The class on the other side, None where it is missing; a class without a side is its own."""
    name = words[number]
    if HEART & set(name) and "lateral" not in name:  # the lateral ventricles are the brain's
        return number
    mirrored = tuple(OTHER_SIDE.get(word, word) for word in name)
    if mirrored != name:
        return words.index(mirrored) if mirrored in words else None
    return next((words.index(other) for other in _joined(name) if other in words), number)


def _joined(name: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The name with one word's first or last letters changed to the other side's."""
    for place, word in enumerate(name):
        for side, other in JOINED:
            if word.isalpha() and len(word) < len(side) + MIN_STEM:
                continue
            if word.startswith(side):
                yield (*name[:place], other + word[len(side) :], *name[place + 1 :])
            if word.endswith(side):
                yield (*name[:place], word[: -len(side)] + other, *name[place + 1 :])
