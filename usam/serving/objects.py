"""One object that a user marks in one scan: its marks, its mask, and undo."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from usam.serving.marks import Mark, Part


@dataclass(frozen=True)
class Region:
    """A mask within its bounding box: slices along the scan's axes, and the mask there."""

    part: Part
    mask: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray) -> Region | None:
        """The region of a mask (I, J, K) bool; None for an empty one."""
        spans = []
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            found = np.flatnonzero(mask.any(axis=others))
            if not len(found):
                return None
            spans.append(slice(int(found[0]), int(found[-1]) + 1))
        return cls(tuple(spans), mask[tuple(spans)].copy())


def union(first: Region | None, second: Region | None) -> Part | None:
    """The smallest part of the scan that holds both regions; None without any."""
    parts = [region.part for region in (first, second) if region is not None]
    if not parts:
        return None
    return tuple(
        slice(min(part[axis].start for part in parts), max(part[axis].stop for part in parts))
        for axis in range(3)
    )


class MarkedMask(ABC):
    """An object's marks and the resulting mask.

    `region` is its mask in the scan's own axes, None while it is empty; `stopped_early` says that
    `finish` may find more of it.
    """

    shape: tuple[int, int, int]

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.start: np.ndarray | None = None
        self.region: Region | None = None
        self._history: list[Callable[[], None]] = []

    @property
    def stopped_early(self) -> bool:
        """Whether the last prediction stopped at its time limit."""
        return False

    @property
    def is_blank(self) -> bool:
        """Whether there are no marks."""
        return not self.marks and self.start is None

    def add(self, mark: Mark) -> None:
        """Add a mark and predict. Raises ValueError if it is outside the scan or not supported.

        After an error everything is as before.
        """
        self.check(mark)
        undo, before = self._way_back(), self.region
        self.marks.append(mark)
        try:
            self._answer(mark)
        except BaseException:
            self.marks.pop()
            undo()
            self.region = before
            raise
        self._history.append(lambda: (self.marks.pop(), undo()))

    def begin_with(self, mask: np.ndarray) -> None:
        """Start from a mask (I, J, K) bool instead of what was marked so far; it can be undone."""
        if mask.shape != self.shape:
            raise ValueError(f"a mask of {mask.shape} voxels; the scan has {self.shape}")
        undo, marks, start = self._way_back(), self.marks, self.start
        self.marks, self.start = [], mask.copy() if mask.any() else None
        self._restart()
        self.region = Region.of(mask)

        def go_back() -> None:
            self.marks, self.start = marks, start
            undo()

        self._history.append(go_back)

    def undo(self) -> bool:
        """Undo the last mark; False if there is none."""
        if not self._history:
            return False
        self._history.pop()()
        return True

    def resume(self, marks: list[Mark], start: Region | None, region: Region | None) -> None:
        """Restore marks and mask of an earlier session; nothing is computed before the next mark.

        start: the mask that the object started from. The marks can be taken back one by one.
        """
        self.marks, self.region, self.start = list(marks), region, None
        if start is not None:
            self.start = np.zeros(self.shape, dtype=bool)
            self.start[start.part] = start.mask
        self._resume()
        self._history = [self._drop_last] * len(marks)

    def _drop_last(self) -> None:
        self.marks.pop()
        self._restart()
        self._answer_all()

    def check(self, mark: Mark) -> None:
        """Raises ValueError for a mark outside the scan, or one that the model does not take."""
        voxels = [voxel for voxel, _ in mark.clicks] + list(mark.box or ())
        for voxel in voxels:
            if any(not 0 <= i < size for i, size in zip(voxel, self.shape, strict=True)):
                place = " ".join(map(str, voxel))
                last = " ".join(str(size - 1) for size in self.shape)
                raise ValueError(f"voxel {place} lies outside the scan, 0 0 0 to {last}")

    @abstractmethod
    def finish(self, max_seconds: float = math.inf) -> bool:
        """Complete the prediction, within `max_seconds` if given; returns whether any was left."""

    @abstractmethod
    def prompts(self) -> dict[str, Any] | None:
        """The marks in the form that --prompts reads; None if there are none it can read."""

    @abstractmethod
    def _answer(self, mark: Mark) -> None:
        """Set `region` after a mark, the last of `marks`."""

    @abstractmethod
    def _resume(self) -> None:
        """Restore `marks` and `region` of an earlier session."""

    @abstractmethod
    def _answer_all(self) -> None:
        """Set `region` after all of `marks`, or `start`, or to None."""

    @abstractmethod
    def _restart(self) -> None:
        """Discard all predictions; there are no marks."""

    @abstractmethod
    def _way_back(self) -> Callable[[], None]:
        """A function that restores the current predictions and `region`."""
