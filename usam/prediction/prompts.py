"""Boxes and points that a user gives for a scan, from flags or a JSON file.

u-sam.py reads them; usam.predict turns them into what U-SAM takes slice by slice. Frames: a point
is (x, y, z), the voxel's indices along the three axes of the file as stored, from 0, or with mm
scanner coordinates in millimetres, RAS as in NIfTI and 3D Slicer. A box is (x1, y1, x2, y2) on one
slice: indices of its first and last voxel along the two axes of the file that lie in the slice, in
the order of the file, and its slice is the index along the third, the axis nearest to head-feet.
For a scan stored slice by slice that is columns, rows and the slice's number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from usam.cli.choices import MIXED, PROMPT_MODES

MAX_JSON_BYTES = 64 << 20
NOT_A_POINT = -1
POINTS_PER_CLASS = 3  # in training
OUTSIDE_CROP = "lies in the rim of the slice that the model never sees"


class PreparedScan(Protocol):
    """What dataset.scan_slices.ScanSlices offers; stated here because usam imports no dataset.

    header: path, format, shape (I, J, K) and affine, voxel index of the file -> RAS mm, or None.
    shape: (S, H, W) of the slices at native size; box: (y0, y1, x0, x1), the part of them that the
    model sees; slice_axis: the file's axis that runs through them; window: what became 0 and 255;
    pixel_aspect: height of an upright slice's pixel over its width.
    """

    header: Any
    shape: tuple[int, int, int]
    box: tuple[int, int, int, int]
    slice_axis: int
    img_size: int
    window: Any
    pixel_aspect: float

    def __len__(self) -> int:
        """How many slices there are."""

    def plane(self, k: int) -> np.ndarray:
        """Slice k, windowed: uint8 (H, W)."""

    def model_input(self, k: int) -> np.ndarray:
        """Slice k for the model: uint8 (C, img_size, img_size)."""

    def canonical(self, array: np.ndarray) -> np.ndarray:
        """An array (I, J, K) as slices (S, H, W), a view."""

    def locate(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (P, 3) of the file -> (slice, row, column) (P, 3)."""


@dataclass(frozen=True)
class ScanPrompts:
    """What a user marked in one scan; frames as in this module's docstring.

    points: (x, y, z, label), label 1 object or 0 background. boxes: (slice, x1, y1, x2, y2), slice
    None where the scan has only one. mm: points are in millimetres, boxes never.
    """

    points: tuple[tuple[float, float, float, int], ...] = ()
    boxes: tuple[tuple[int | None, float, float, float, float], ...] = ()
    mm: bool = False

    def __bool__(self) -> bool:
        return bool(self.points or self.boxes)


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


# ------------------------------------------------------------------ reading them


def prompts_from_flags(
    points: Sequence[Sequence[float]] | None,
    boxes: Sequence[Sequence[float]] | None,
    slices: Sequence[int] | None,
    *,
    mm: bool = False,
) -> ScanPrompts:
    """The prompts of --point x y z [label], --box x1 y1 x2 y2, --slice k and --mm.

    The n-th slice belongs to the n-th box. Raises ValueError for wrong counts and values.
    """
    boxes, slices = boxes or [], slices or []
    if slices and len(slices) != len(boxes):
        raise ValueError(f"{len(boxes)} --box and {len(slices)} --slice; give one for each other")
    numbers = slices or [None] * len(boxes)
    return ScanPrompts(
        points=tuple(_point(point) for point in points or []),
        boxes=tuple(_box(k, box) for k, box in zip(numbers, boxes, strict=True)),
        mm=mm,
    )


def read_prompts(path: Path, name: str) -> ScanPrompts:
    """The prompts for the scan `name` (its file's name) in a JSON file.

    {"points": [[x, y, z], [x, y, z, label]], "boxes": [{"slice": k, "box": [x1, y1, x2, y2]}],
    "mm": false} for one scan, or {"scans": {NAME: {...}, ...}} for many. Raises FileNotFoundError
    and ValueError for anything else, and for a scan that the file does not name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, not a list of prompts")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("scans"), dict):
            content = content["scans"].get(name)
            if content is None:
                raise ValueError(f"names no scan {name!r}")
        return _from_json(content)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's own errors among them
        raise ValueError(f"{path}: {error}") from None


def _from_json(content: Any) -> ScanPrompts:
    if not isinstance(content, dict) or not content.keys() <= {"points", "boxes", "mm"}:
        raise ValueError('wanted an object with "points", "boxes" and "mm"')
    points, boxes = content.get("points", []), content.get("boxes", [])
    if not isinstance(points, list) or not isinstance(boxes, list):
        raise ValueError('"points" and "boxes" must be lists')
    for box in boxes:
        if not isinstance(box, dict) or not {"box"} <= box.keys() <= {"box", "slice"}:
            raise ValueError(f'a box is {{"slice": k, "box": [x1, y1, x2, y2]}}, found {box!r:.80}')
    return ScanPrompts(
        points=tuple(_point(point) for point in points),
        boxes=tuple(_box(box.get("slice"), box["box"]) for box in boxes),
        mm=bool(content.get("mm", False)),
    )


def _numbers(values: Any, counts: tuple[int, ...], wanted: str) -> list[float]:
    is_list = isinstance(values, list | tuple) and len(values) in counts
    if not is_list or not all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    ):
        raise ValueError(f"{wanted}, found {values!r:.80}")
    return [float(value) for value in values]


def _point(values: Any) -> tuple[float, float, float, int]:
    x, y, z, label = [*_numbers(values, (3, 4), "a point is x y z [label]"), 1.0][:4]
    if label not in (0, 1):
        raise ValueError(f"a point's label is 1 (object) or 0 (background), found {label:g}")
    return x, y, z, int(label)


def _box(number: Any, values: Any) -> tuple[int | None, float, float, float, float]:
    x1, y1, x2, y2 = _numbers(values, (4,), "a box is x1 y1 x2 y2")
    if x1 > x2 or y1 > y2:
        raise ValueError(f"box {x1:g} {y1:g} {x2:g} {y2:g}: wanted x1 <= x2 and y1 <= y2")
    if number is not None and not (isinstance(number, int) and number >= 0):
        raise ValueError(f"a slice is an index of 0 or more, found {number!r:.80}")
    return number, x1, y1, x2, y2


# ------------------------------------------------------------------ for U-SAM, slice by slice


@dataclass(frozen=True)
class SlicePrompts:
    """What U-SAM is given for a scan, in pixels of its input, by slice; None: takes no prompts.

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


def slice_prompts(prompts: ScanPrompts, mode: int | str, scan: PreparedScan) -> SlicePrompts | None:
    """A user's prompts as the model of a prompt mode takes them; None for a model without any.

    A model trained with MIXED takes what there is: both kinds, one, or none.
    Raises ValueError where prompts are missing, not of the model's kind, or outside the scan.
    """
    if mode == MIXED:
        mode = (1 if prompts.boxes else 0) + (2 if prompts.points else 0)
    _check_kinds(prompts, mode, scan.header.path)
    if mode == 0:
        return None
    points: dict[int, list] = {}
    voxels = point_voxels(prompts, scan.header.affine, scan.header.path)
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


def _corners(number: int | None, sides: Sequence[float], scan: PreparedScan) -> np.ndarray:
    """The box's two corners as voxels (2, 3); see this module's docstring for its frame."""
    axis, path = scan.slice_axis, scan.header.path
    if number is None:
        if len(scan) > 1:
            raise ValueError(f"{path}: has {len(scan)} slices; give each --box a --slice")
        number = 0
    corners = np.array([sides[:2], sides[2:]], dtype=np.float64)
    return np.insert(corners, axis, number, axis=1)


def _in_image(voxels: np.ndarray, scan: PreparedScan) -> tuple[int, np.ndarray]:
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
    number = int(np.clip(np.rint(place[0, 0]), 0, len(scan) - 1))
    return number, pixels[:, ::-1]
