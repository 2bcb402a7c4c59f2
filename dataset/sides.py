"""Left and right classes: which ids are swapped when a patient is mirrored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


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
    """The sides that class names state: "left kidney", "kidney_left", "femur r".

    classes: one name per id, background first. Case and separators do not matter.
    """
    words = [tuple(re.findall(r"[^\W\d_]+|\d+", name.lower())) for name in classes]
    ids, unpaired = list(range(len(classes))), []
    for number, name in enumerate(words):
        mirrored = tuple(OTHER_SIDE.get(word, word) for word in name)
        if mirrored == name:
            continue
        if mirrored in words:
            ids[number] = words.index(mirrored)
        else:
            unpaired.append(classes[number])
    return Sides(tuple(ids), tuple(unpaired))
