"""An object clicked with SAM-Med3D, in windows of the 1.5 mm volume; mask on the scan's voxels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dataset.scans.volumes import ScanVolume, resample_label
from usam.models.sam_med3d import THRESHOLD
from usam.prediction.windows import EmbeddingCache, Session, Voxel, centred
from usam.serving.marks import Mark, box_centre
from usam.serving.objects import MarkedMask, Region


class VolumeMask(MarkedMask):
    """The marks of one object and its mask, predicted in windows of one scan.

    The same marks, in the same order, as a file for `--predict --prompts` give the same mask. A
    box becomes a click in its centre, and for a model that takes boxes also a box, which must have
    more than one voxel along each axis.
    """

    def __init__(self, cache: EmbeddingCache, scan: ScanVolume, max_seconds: float) -> None:
        super().__init__()
        self.cache, self.scan, self.max_seconds = cache, scan, max_seconds
        self.shape = tuple(scan.grid.header.shape)
        self._session: Session | None = None
        self._number = 0  # of sessions so far

    @property
    def stopped_early(self) -> bool:
        """Whether windows are missing where the object continues."""
        return self._session is not None and self._session.stopped_early

    def finish(self, max_seconds: float = math.inf) -> bool:
        """Open all missing windows; refine a starting mask that has no marks."""
        is_unseen = self._session is None and self.start is not None
        if is_unseen:
            self._replay()
        elif self.stopped_early:
            self._session.grow(max_seconds)
        else:
            return False
        self.region = self._region()
        return True

    def limit_time(self, max_seconds: float) -> None:
        """Stop opening windows this many seconds after a click."""
        self.max_seconds = max_seconds
        if self._session is not None:
            self._session.max_seconds = max_seconds

    def prompts(self) -> dict[str, Any] | None:
        """Points, box and centre of one object; None without a click inside or a box."""
        if not any(mark.has_inside for mark in self.marks):
            return None
        box, clicks = self._box_and_clicks()
        content: dict[str, Any] = {"points": [[*voxel, label] for voxel, label in clicks]}
        if box:
            return content | {"box": [*box[0], *box[1]]}
        inside = next(voxel for voxel, label in clicks if label)
        return content | ({"centre": list(inside)} if self.start is None else {})

    def _answer(self, mark: Mark) -> None:
        is_box = self._model_box(mark) is not None
        if not any(one.has_inside for one in self.marks) and self.start is None:
            return  # nothing says yet where the object is
        if self._session is None or is_box:
            self._replay()
        else:
            for number, (voxel, label) in enumerate(self._clicks_of(mark), start=1):
                is_last = number == len(self._clicks_of(mark))
                self._session.click(self._place(voxel), label, is_last=is_last)
        self.region = self._region()

    def _replay(self) -> None:
        """A new session with all marks: the first window, a box, then the clicks in order."""
        box, clicks = self._box_and_clicks()
        known = None
        if self.start is not None:
            label = resample_label(self.start.astype(np.uint8), self.scan.grid)
            known = torch.from_numpy(label > 0) if label.any() else None
        session = Session(self.cache, known, self.max_seconds)
        session.look(self._first_window(box, clicks, known))
        corners = box and tuple(self._place(corner) for corner in box)
        clicks = [*([(box_centre(corners), 1)] if box else []),
                  *((self._place(voxel), label) for voxel, label in clicks)]  # fmt: skip
        for number, (voxel, label) in enumerate(clicks, start=1):
            session.click(voxel, label, corners, is_last=number == len(clicks))
        self._session = session
        self._number += 1

    def _first_window(self, box: Any, clicks: list, known: torch.Tensor | None) -> Voxel:
        side = self.cache.model.side
        inside = [voxel for voxel, label in clicks if label]
        if box:
            middle = box_centre(tuple(self._place(corner) for corner in box))
        elif inside:
            middle = self._place(inside[0])
        elif known is not None:
            found = known.nonzero()
            middle = ((found.amin(dim=0) + found.amax(dim=0)) // 2).tolist()
        else:  # the given mask is too small for 1.5 mm
            middle = self._place(tuple(np.argwhere(self.start)[0].tolist()))
        return centred(middle, side)

    def _box_and_clicks(self) -> tuple[Any, list[tuple[Voxel, int]]]:
        """The last box that the model takes as one, and all clicks, centres of others included."""
        boxes = [self._model_box(mark) for mark in self.marks if self._model_box(mark)]
        box = boxes[-1] if boxes else None
        return box, [click for mark in self.marks for click in self._clicks_of(mark)]

    def _clicks_of(self, mark: Mark) -> list[tuple[Voxel, int]]:
        if mark.box and self._model_box(mark) is None:
            return [(box_centre(mark.box), 1), *mark.clicks]
        return list(mark.clicks)

    def _model_box(self, mark: Mark) -> tuple[Voxel, Voxel] | None:
        if mark.box is None or not self.cache.takes_boxes:
            return None
        low, high = mark.box
        return mark.box if all(a < b for a, b in zip(low, high, strict=True)) else None

    def _place(self, voxel: Voxel) -> Voxel:
        """The voxel of the 1.5 mm volume that holds a voxel of the scan."""
        return tuple(self.scan.grid.nearest_of(np.array([voxel], dtype=float))[0].tolist())

    def _region(self) -> Region | None:
        return restored(self.scan, (self._session.logits > THRESHOLD).cpu().numpy())

    def _restart(self) -> None:
        self._session = None
        self._number += 1  # earlier states are of no use

    def _resume(self) -> None:
        self._session = None  # the next mark replays all

    def _answer_all(self) -> None:
        if any(mark.has_inside for mark in self.marks) or (self.marks and self.start is not None):
            self._replay()
            self.region = self._region()
        else:
            self.region = None if self.start is None else Region.of(self.start)

    def _way_back(self) -> Callable[[], None]:
        number, region = self._number, self.region
        state = self._session and self._session.state()

        def go_back() -> None:
            if state is None:
                self._session = None
            elif number == self._number:
                self._session.restore(state, answer=False)
            else:  # that session is gone: each holds two volumes
                self._replay()
            self.region = region

        return go_back


def restored(scan: ScanVolume, mask: np.ndarray) -> Region | None:
    """A mask of the 1.5 mm volume (X, Y, Z) on the scan's own voxels, without its empty parts.

    As `ScanVolume.restore`, which makes the whole scan instead.
    """
    found = Region.of(mask)
    if found is None:
        return None
    turn, spans, sources = scan.grid.turn, [], []
    for target, flip in turn:
        axis = int(target)
        index = scan.grid.nearest(axis)  # in LPS order; x and y of the volume run the other way
        index = index if axis == 2 else scan.grid.shape[axis] - 1 - index
        index = index[::-1] if flip < 0 else index
        inside = np.flatnonzero((index >= found.part[axis].start) & (index < found.part[axis].stop))
        if not len(inside):  # the mask lies between two voxels of a coarse scan
            return None
        spans.append(slice(int(inside[0]), int(inside[-1]) + 1))
        sources.append(index[spans[-1]] - found.part[axis].start)
    turned = found.mask.transpose([int(target) for target, _ in turn])[np.ix_(*sources)]
    inner = Region.of(turned)
    if inner is None:
        return None
    part = tuple(
        slice(outer.start + own.start, outer.start + own.stop)
        for outer, own in zip(spans, inner.part, strict=True)
    )
    return Region(part, inner.mask)
