"""Objects that a user marks with boxes and points, in pixels of a scan's slices."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataset.scans.header import size_text
from dataset.scans.slices import ScanSlices
from usam.prediction.prompts import (
    ObjectPrompts,
    ScanPrompts,
    slice_prompts_of,
    volume_prompts_of,
)

Box = tuple[float, float, float, float]
SLICE_BOX, VOLUME_BOX = 4, 6  # numbers


@dataclass(frozen=True)
class SliceObject:
    """One object: boxes (x1, y1, x2, y2) and points (x, y, label) by slice, in pixels.

    span: first and last slice of an object that is followed from slice to slice. limit: the box
    that it stays in there.
    """

    name: str
    label: int
    boxes: Mapping[int, Box] = field(default_factory=dict)
    points: Mapping[int, Sequence[tuple[float, float, int]]] = field(default_factory=dict)
    span: tuple[int, int] | None = None
    limit: Box | None = None

    @property
    def slices(self) -> list[int]:
        """The slices that are segmented, in order."""
        marked = sorted({*self.boxes, *self.points})
        return marked if self.span is None else sorted({*marked, *range(*_ends(self.span))})

    def chains(self) -> Iterator[tuple[int, list[range]]]:
        """Each marked slice with the slices to segment from it, downwards and upwards.

        Between two boxed slices each reaches half the way.
        """
        marked, seeds = sorted({*self.boxes, *self.points}), sorted(self.boxes)
        for k in marked:
            if self.span is None or k not in self.boxes:
                yield k, []
                continue
            first, last = self.span
            below = max((s for s in seeds if s < k), default=None)
            above = min((s for s in seeds if s > k), default=None)
            low = first if below is None else (below + k) // 2 + 1
            high = last if above is None else (k + above) // 2
            reached = [range(k - 1, low - 1, -1), range(k + 1, high + 1)]
            yield k, [[n for n in part if n not in self.points] for part in reached]


def _ends(span: tuple[int, int]) -> tuple[int, int]:
    return span[0], span[1] + 1


def objects_of(
    args: Namespace, contents: Mapping[Path, Any] | None, scan: ScanSlices
) -> list[SliceObject]:
    """The objects marked in a scan by --box, --slice and --point, or by its part of --prompts.

    Raises ValueError where there is no prompt, or one that is outside the scan.
    """
    path = scan.header.path
    boxes = args.box or []
    content = None if contents is None else contents.get(path)
    volumes = any(len(box) == VOLUME_BOX for box in boxes)
    if volumes or (isinstance(content, dict) and "objects" in content):
        given = volume_prompts_of(args, contents, path)
        return [on_slices(one, scan, mm=given.mm) for one in given.objects]
    return [from_scan_prompts(slice_prompts_of(args, contents, path), scan)]


def from_scan_prompts(given: ScanPrompts, scan: ScanSlices) -> SliceObject:
    """One object from the boxes and points of a scan."""
    one = ObjectPrompts(points=given.points, boxes=given.boxes)
    return on_slices(one, scan, mm=given.mm)


def on_slices(one: ObjectPrompts, scan: ScanSlices, *, mm: bool) -> SliceObject:
    """An object's prompts in pixels of the scan's slices; see `prompts` for their frames.

    Raises ValueError for an object without a prompt, a box of no area and what is outside.
    """
    path = scan.header.path
    if not one.boxes and one.box is None and not any(point[3] for point in one.points):
        problem = "has only points outside it" if one.points else "has no prompt"
        raise ValueError(f"{path}: {one.name} {problem}; give --box, --point or --prompts FILE")
    points: dict[int, list[tuple[float, float, int]]] = {}
    voxels = _voxels([point[:3] for point in one.points], scan, mm=mm)
    for (k, y, x), point in zip(_located(voxels, scan), one.points, strict=True):
        points.setdefault(round(k), []).append((float(x), float(y), point[3]))
    boxes: dict[int, Box] = {}
    for number, *sides in one.boxes:
        place = _located(_corners(number, sides, scan), scan)
        k = round(place[0, 0])
        if k in boxes:
            raise ValueError(
                f"{path}: {one.name} has two boxes on slice {number}; mark several objects with "
                '"objects" in --prompts FILE'
            )
        boxes[k] = _checked_box(place, one.name, scan)
    for k, given in points.items():
        if k not in boxes and one.box is None and not any(label for *_, label in given):
            raise ValueError(f"{path}: {one.name} has only points outside it on a slice")
    span = (min(boxes), max(boxes)) if len(boxes) > 1 else None
    if one.box is None:
        return SliceObject(one.name, one.label, boxes, points, span)
    if boxes:
        raise ValueError(f"{path}: {one.name} has a 3D box and boxes on slices; give one kind")
    if len(scan) == 1:
        raise ValueError(f"{path}: a 3D box on a scan of one slice; give --box x1 y1 x2 y2")
    place = _located(_voxels(np.reshape(one.box, (2, 3)), scan, mm=mm), scan)
    limit = _checked_box(place, one.name, scan)
    first, last = sorted(round(k) for k in place[:, 0])
    return SliceObject(
        one.name, one.label, {(first + last) // 2: limit}, points, (first, last), limit
    )


def _checked_box(place: np.ndarray, name: str, scan: ScanSlices) -> Box:
    """A box from two corners (2, 3), (slice, row, column)."""
    (y1, x1), (y2, x2) = place[:, 1:].min(axis=0), place[:, 1:].max(axis=0)
    if not (x2 > x1 and y2 > y1):
        raise ValueError(f"{scan.header.path}: the box of {name} has no area")
    return float(x1), float(y1), float(x2), float(y2)


def _voxels(points: Any, scan: ScanSlices, *, mm: bool) -> np.ndarray:
    """Points (P, 3) as voxel indices along the axes of the file."""
    points = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    if not mm:
        return points
    if scan.header.spacing is None:
        raise ValueError(f"{scan.header.path}: has no scanner coordinates; give prompts as voxels")
    inverse = np.linalg.inv(scan.header.affine)
    return points @ inverse[:3, :3].T + inverse[:3, 3]


def _corners(number: int | None, sides: Sequence[float], scan: ScanSlices) -> np.ndarray:
    """The two corners of a box on a slice as voxels (2, 3)."""
    if number is None:
        if len(scan) > 1:
            raise ValueError(
                f"{scan.header.path}: has {len(scan)} slices; give each --box a --slice"
            )
        number = 0
    corners = np.array([sides[:2], sides[2:]], dtype=np.float64)
    return np.insert(corners, scan.slice_axis, number, axis=1)


def _located(voxels: np.ndarray, scan: ScanSlices) -> np.ndarray:
    """Voxels (P, 3) as (slice, row, column); ValueError for the first outside the scan."""
    shape = np.array(scan.header.shape)
    outside = ((voxels < -0.5) | (voxels > shape - 0.5)).any(axis=1)
    if outside.any():
        place = ", ".join(f"{value:.4g}" for value in voxels[outside][0])
        raise ValueError(
            f"{scan.header.path}: prompt at voxel ({place}) is outside {size_text(shape)} voxels"
        )
    place = scan.locate(voxels)
    return place.clip(0, np.array(scan.shape) - 1)
