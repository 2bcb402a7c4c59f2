"""An object marked with a 2D model that takes prompts: one slice after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dataset.scans.slices import ScanSlices
from usam.cli.choices import MIXED, PROMPT_MODES
from usam.prediction.prompts import ScanPrompts
from usam.prediction.slice_prompts import slice_prompts
from usam.prediction.slices import Predictor, check_finite, slice_logits, to_native
from usam.prediction.windows import Voxel
from usam.serving.marks import Mark, deep_voxels
from usam.serving.objects import MarkedMask, Region

CARRIED = 10  # slices on each side for one request
CARRIED_POINTS = 3
LEAST_PIXELS = 4  # of a slice's mask that is carried on


class SliceMask(MarkedMask):
    """The marks of one object and its mask, predicted on the slices that have marks.

    A model of several classes answers with all of them: the object is the class at its first
    click, or the largest in its first box. A slice without marks keeps the mask that it started
    with, if there is one.
    """

    def __init__(self, scan: ScanSlices, predictor: Predictor) -> None:
        super().__init__()
        self.scan, self.predictor = scan, predictor
        self.shape = tuple(scan.header.shape)
        self.axis = scan.slice_axis
        self._planes: dict[int, np.ndarray] = {}  # by the index along the scan's own axis
        self._class: int | None = None

    @property
    def takes(self) -> tuple[bool, bool]:
        """Whether the model takes points, and boxes."""
        return takes(self.predictor.prompt_mode)

    def check(self, mark: Mark) -> None:
        """Also refuses boxes over several slices, and prompts that the model does not take."""
        super().check(mark)
        points, boxes = self.takes
        mode = self.predictor.prompt_mode
        trained = f"the model was trained with prompts: {PROMPT_MODES.get(mode, mode)}"
        if mark.clicks and not points:
            raise ValueError(f"{trained}; it takes no clicks, draw a box")
        if mark.box and not boxes:
            raise ValueError(f"{trained}; it takes no boxes, click instead")
        if mark.box and mark.box[0][self.axis] != mark.box[1][self.axis]:
            raise ValueError("a box of a 2D model lies on one slice; draw it on an axial slice")

    def finish(self, max_seconds: float = math.inf) -> bool:
        """Carry the marks to neighbouring slices, see `carry`."""
        return self.carry() > 0

    def carry(self, slices: int = CARRIED) -> int:
        """Mark up to `slices` slices on each side from the mask beside them; returns how many.

        It ends where the object does, or meets a slice with marks. `undo` takes all of them back.
        """
        known, undo, before = set(self._planes), self._way_back(), list(self.marks)
        for first, step in ((max(known, default=0), 1), (min(known, default=0), -1)):
            k = first
            for _ in range(slices if known else 0):
                plane, k = self._planes[k], k + step
                if not 0 <= k < self.shape[self.axis] or k in known:
                    break
                if np.count_nonzero(plane) < LEAST_PIXELS:
                    break
                self.marks.append(self._carried(plane, k))
                self._answer_on(k)
        self._keep_region()
        marks = self.marks

        def go_back() -> None:
            self.marks = before
            undo()

        if len(marks) > len(before):
            self._history.append(go_back)
        return len(marks) - len(before)

    def prompts(self) -> dict[str, Any] | None:
        """Points and boxes of the scan; None without any."""
        given = self._given()
        if not given:
            return None
        return {
            "points": [list(point) for point in given.points],
            "boxes": [{"slice": k, "box": list(sides)} for k, *sides in given.boxes],
        }

    def _given(self, only: int | None = None) -> ScanPrompts:
        """All marks, or those on one slice, as for --prompts; the last box of a slice counts."""
        points, boxes = [], {}
        for mark in self.marks:
            points += [(*map(float, voxel), label) for voxel, label in mark.clicks]
            if mark.box:
                low, high = (np.delete(corner, self.axis).tolist() for corner in mark.box)
                boxes[mark.box[0][self.axis]] = (*map(float, low), *map(float, high))
        found = tuple((k, *sides) for k, sides in boxes.items())
        if only is not None:
            points = [point for point in points if point[self.axis] == only]
            found = tuple(box for box in found if box[0] == only)
        return ScanPrompts(tuple(points), found)

    def _answer(self, mark: Mark) -> None:
        for k in self._marked_slices([mark]):
            self._answer_on(k)
        self._keep_region()

    def _answer_on(self, k: int) -> None:
        """Segment slice k from its marks; without a click inside or a box it stays empty."""
        given = self._given(k)
        across = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        if not given.boxes and not any(point[3] for point in given.points):
            self._planes = self._planes | {k: np.zeros(across, dtype=bool)}
            return
        label = self._labels_on(k, given)
        if self._class is None:
            self._class = self._class_at(label, given)
        found = label == self._class if self._class else np.zeros(across, dtype=bool)
        self._planes = self._planes | {k: found}

    def _labels_on(self, k: int, given: ScanPrompts) -> np.ndarray:
        """Predicted classes of slice k, along the scan's two in-plane axes."""
        mode = self.predictor.prompt_mode
        if mode == 3:  # both are wanted; the kind that is missing gets what training gives
            kinds = {(True, False): 2, (False, True): 1, (True, True): 3}
            mode = kinds[bool(given.points), bool(given.boxes)]
        slot = slice_prompts(given, mode, self.scan)
        slot = replace(slot, mode=3) if self.predictor.prompt_mode == 3 else slot
        (number,) = slot.slices
        image = torch.from_numpy(self.scan.model_input(number))[None]
        logits = slice_logits(self.predictor, image, [number], slot)
        check_finite(logits, [number], self.scan)
        native = to_native(logits, self.scan.box, self.scan.shape[1:]).argmax(dim=1)[0]
        whole = np.zeros(self.shape, dtype=np.uint8)  # only the pages of one slice are touched
        self.scan.canonical(whole)[number] = native.to(torch.uint8).cpu().numpy()
        return whole.take(k, axis=self.axis)

    def _class_at(self, label: np.ndarray, given: ScanPrompts) -> int | None:
        """The class at the first click inside, else the most frequent one in the box or slice."""
        for point in given.points:
            place = tuple(int(v) for v in np.delete(point[:3], self.axis))
            if point[3] and label[place]:
                return int(label[place])
        seen = label
        if given.boxes:
            _, x1, y1, x2, y2 = given.boxes[0]
            seen = label[int(x1) : int(x2) + 1, int(y1) : int(y2) + 1]
        counts = np.bincount(seen.ravel(), minlength=2)[1:]
        return int(counts.argmax()) + 1 if counts.any() else None

    def _carried(self, plane: np.ndarray, k: int) -> Mark:
        """Marks for slice k from the mask `plane` of the slice beside it."""
        points, boxes = self.takes
        rows, columns = np.nonzero(plane)
        low = self._on_slice((rows.min(), columns.min()), k)
        high = self._on_slice((rows.max(), columns.max()), k)
        clicks = deep_voxels(plane, CARRIED_POINTS) if points else []
        return Mark(
            tuple((self._on_slice(place, k), 1) for place in clicks), (low, high) if boxes else None
        )

    def _on_slice(self, place: Any, k: int) -> Voxel:
        return tuple(int(v) for v in np.insert(np.asarray(place), self.axis, k))

    def _keep_region(self) -> None:
        mask = np.zeros(self.shape, dtype=bool) if self.start is None else self.start.copy()
        planes = np.moveaxis(mask, self.axis, 0)
        for k, plane in self._planes.items():
            planes[k] = plane
        self.region = Region.of(mask)

    def _restart(self) -> None:
        self._planes, self._class = {}, None

    def _resume(self) -> None:
        self._restart()
        mask = np.zeros(self.shape, dtype=bool)
        if self.region is not None:
            mask[self.region.part] = self.region.mask
        planes = np.moveaxis(mask, self.axis, 0)
        self._planes = {k: planes[k].copy() for k in self._marked_slices(self.marks)}

    def _answer_all(self) -> None:
        for k in self._marked_slices(self.marks):
            self._answer_on(k)
        self._keep_region()

    def _marked_slices(self, marks: list[Mark]) -> list[int]:
        places = {voxel[self.axis] for mark in marks for voxel, _ in mark.clicks}
        places |= {mark.box[0][self.axis] for mark in marks if mark.box}
        return sorted(places)

    def _way_back(self) -> Callable[[], None]:
        planes, label, region = self._planes, self._class, self.region

        def go_back() -> None:
            self._planes, self._class, self.region = planes, label, region

        return go_back


def takes(mode: int | str) -> tuple[bool, bool]:
    """Whether a model of a prompt mode takes points, and boxes."""
    return mode in (2, 3, MIXED), mode in (1, 3, MIXED)
