"""A user's points and boxes as U-SAM takes them, slice by slice, in pixels of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.scans.header import ScanHeader
from dataset.scans.slices import ScanSlices
from usam.cli.choices import MIXED, PROMPT_MODES
from usam.prediction.prompts import ScanPrompts

NOT_A_POINT = -1
POINTS_PER_CLASS = 3  # in training
OUTSIDE_CROP = "lies in the cropped margin of the slice, which the model does not see"


@dataclass(frozen=True)
class SlicePrompts:
    """U-SAM's prompts for a scan by slice, in pixels of its input; None: the model takes none.

    points: slice -> [(x, y, label), ...]; boxes: slice -> (x1, y1, x2, y2).
    """

    mode: int
    size: int
    points: Mapping[int, list[tuple[float, float, int]]]
    boxes: Mapping[int, tuple[float, float, float, float]]

    @property
    def slices(self) -> list[int]:
        """The slices that carry a prompt, in order: only these are segmented."""
        return sorted(self.points.keys() | self.boxes.keys())

    def batch(
        self, numbers: Sequence[int], num_classes: int, *, row_col: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments `points` and `boxes` of the model for the slices `numbers`.

        Where a slice lacks one kind, it gets what training gives for an empty mask: the whole
        image as its box, points labelled -1. Points are as many as in training or more; a model
        reads no class from their order, only the label. row_col: points as (row, column).
        """
        given: dict[str, Any] = {"points": None, "boxes": None}
        if self.mode in (2, 3):
            most = max(len(self.points.get(k, ())) for k in numbers)
            length = max(most, POINTS_PER_CLASS * (num_classes - 1))
            given["points"] = self._points(numbers, length, row_col=row_col)
        if self.mode in (1, 3):
            whole = (0.0, 0.0, float(self.size), float(self.size))
            given["boxes"] = torch.tensor([self.boxes.get(k, whole) for k in numbers])
        return given

    def _points(self, numbers: Sequence[int], length: int, *, row_col: bool) -> tuple:
        rows = []
        for k in numbers:
            row = [(x, y, label) for x, y, label in self.points.get(k, ())]
            rows.append(row + [(0.0, 0.0, NOT_A_POINT)] * (length - len(row)))
        table: Tensor = torch.tensor(rows, dtype=torch.float32)
        coords = table[..., :2].flip(-1) if row_col else table[..., :2]
        return coords, table[..., 2].long()


def slice_prompts(prompts: ScanPrompts, mode: int | str, scan: ScanSlices) -> SlicePrompts | None:
    """A user's prompts in the form a prompt mode needs; None for a model without prompts.

    A model trained with MIXED takes what there is: both kinds, one, or none.
    Raises ValueError where prompts are missing, not of the model's kind, or outside the scan.
    """
    if mode == MIXED:
        mode = (1 if prompts.boxes else 0) + (2 if prompts.points else 0)
    _check_kinds(prompts, mode, scan.header.path)
    if mode == 0:
        return None
    points: dict[int, list] = {}
    voxels = point_voxels(prompts, _mm_affine(scan.header), scan.header.path)
    for voxel, point in zip(voxels, prompts.points, strict=True):
        k, ((x, y),) = _in_image(voxel[None], scan)
        if not (-0.5 <= x <= scan.img_size - 0.5 and -0.5 <= y <= scan.img_size - 0.5):
            raise ValueError(f"{scan.header.path}: point {point[:3]} {OUTSIDE_CROP}")
        points.setdefault(k, []).append((float(x), float(y), point[3]))
    boxes: dict[int, tuple] = {}
    for number, *sides in prompts.boxes:
        k, corners = _in_image(_corners(number, sides, scan), scan)
        low, high = corners.min(axis=0), corners.max(axis=0)
        if (high < 0).any() or (low > scan.img_size).any():
            raise ValueError(f"{scan.header.path}: box {sides} {OUTSIDE_CROP}")
        if k in boxes:
            raise ValueError(f"{scan.header.path}: two boxes on slice {number}; a slice takes one")
        boxes[k] = tuple(np.concatenate([low, high]).clip(0, scan.img_size).tolist())
    return SlicePrompts(mode, scan.img_size, points, boxes)


def _mm_affine(header: ScanHeader) -> np.ndarray | None:
    """(4, 4) voxel index -> RAS mm; None if the scan states no voxel size."""
    return header.affine if header.spacing else None


def point_voxels(prompts: ScanPrompts, affine: np.ndarray | None, source: Path) -> np.ndarray:
    """The points as voxel indices (P, 3) float along the axes of the file.

    affine (4, 4): voxel index -> RAS mm. Raises ValueError for mm without an affine.
    """
    points = np.array([point[:3] for point in prompts.points], dtype=np.float64).reshape(-1, 3)
    if not prompts.mm:
        return points
    if affine is None:
        raise ValueError(f"{source}: has no scanner coordinates; give points as voxels")
    inverse = np.linalg.inv(affine)
    return points @ inverse[:3, :3].T + inverse[:3, 3]


def _check_kinds(prompts: ScanPrompts, mode: int, source: Path) -> None:
    trained = f"the model was trained with prompts: {PROMPT_MODES[mode]}"
    if mode == 0 and prompts:
        raise ValueError("the model was trained without prompts; leave points and boxes out")
    if mode in (1, 2, 3) and not prompts:
        wanted = {1: "--box and --slice", 2: "--point", 3: "--point and --box with --slice"}[mode]
        raise ValueError(f"{source}: {trained}; give {wanted}, or --prompts FILE")
    if mode == 1 and prompts.points:
        raise ValueError(f"{source}: {trained}; it takes no points")
    if mode == 2 and prompts.boxes:
        raise ValueError(f"{source}: {trained}; it takes no boxes")


def _corners(number: int | None, sides: Sequence[float], scan: ScanSlices) -> np.ndarray:
    """The box's two corners as voxels (2, 3); see this module's docstring for its frame."""
    axis, path = scan.slice_axis, scan.header.path
    if number is None:
        if len(scan) > 1:
            raise ValueError(f"{path}: has {len(scan)} slices; give each --box a --slice")
        number = 0
    corners = np.array([sides[:2], sides[2:]], dtype=np.float64)
    return np.insert(corners, axis, number, axis=1)


def _in_image(voxels: np.ndarray, scan: ScanSlices) -> tuple[int, np.ndarray]:
    """The slice that voxels (P, 3) lie on and their pixels (P, 2), (x, y), in the model's image.

    Pixel centres lie at whole numbers in both grids, whose outer edges are shared, as everywhere.
    Raises ValueError for the first voxel outside the scan.
    """
    shape = np.array(scan.header.shape)
    outside = ((voxels < -0.5) | (voxels > shape - 0.5)).any(axis=1)
    if outside.any():
        place = ", ".join(f"{value:.4g}" for value in voxels[outside][0])
        size = " x ".join(map(str, shape))
        raise ValueError(f"{scan.header.path}: prompt at voxel ({place}) is outside {size} voxels")
    place = scan.locate(voxels)
    y0, y1, x0, x1 = scan.box
    origin, side = np.array([y0, x0]), np.array([y1 - y0, x1 - x0])
    pixels = (place[:, 1:] + 0.5 - origin) * scan.img_size / side - 0.5
    return _slice_at(place[0, 0], scan), pixels[:, ::-1]


def marks_on_slices(
    prompts: ScanPrompts, scan: ScanSlices
) -> dict[int, tuple[list[tuple[float, float, int]], list[tuple[float, ...]]]]:
    """The prompts by slice, in pixels of the scan's slices: points (x, y, label) and boxes."""
    marks: dict[int, tuple[list, list]] = {}
    voxels = point_voxels(prompts, _mm_affine(scan.header), scan.header.path)
    for (k, row, column), point in zip(scan.locate(voxels), prompts.points, strict=True):
        marks.setdefault(_slice_at(k, scan), ([], []))[0].append((column, row, point[3]))
    for number, *sides in prompts.boxes:
        places = scan.locate(_corners(number, sides, scan))
        (y1, x1), (y2, x2) = places[:, 1:].min(axis=0), places[:, 1:].max(axis=0)
        marks.setdefault(_slice_at(places[0, 0], scan), ([], []))[1].append((x1, y1, x2, y2))
    return marks


def _slice_at(position: float, scan: ScanSlices) -> int:
    return int(np.clip(np.rint(position), 0, len(scan) - 1))
