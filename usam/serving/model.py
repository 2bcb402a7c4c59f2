"""The model of a server, and the interactive masks it creates."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt

from dataset.scans.header import Scan, ScanHeader, check_header, narrow, whole_as_int16
from dataset.scans.read import read_scan
from dataset.scans.volumes import volume_of
from dataset.scans.window import parse_window
from usam.prediction.slices import SliceModel
from usam.prediction.volumes import VolumeModel
from usam.prediction.windows import MAX_CACHE_BYTES, EmbeddingCache
from usam.runtime.precision import Precision
from usam.serving.objects import MarkedMask
from usam.serving.slice_mask import SliceMask, takes
from usam.serving.volume_mask import VolumeMask

CLICK_SECONDS = 8.0  # after which no further window is opened; clients wait 60
POSITIVE = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True)
class Clickable:
    """A model that takes prompts: which ones, and a function that opens a scan for it.

    open_scan: a scan -> a function that makes an empty marked mask of it; prepares the scan once.
    """

    name: str
    points: bool
    boxes: bool
    is_volumetric: bool
    open_scan: Callable[[Scan], Callable[[], MarkedMask]]


def load(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> Clickable:
    """The model of --resume or --sam_weight; ValueError for one trained without prompts."""
    check_clickable(args)
    if args.window:
        parse_window(args.window)  # a wrong one is named before the model is read
    if args.model == "sam-med3d":
        return clickable(VolumeModel(args, precision, saved), args)
    return clickable(SliceModel(args, precision, saved), args)


def check_clickable(args: Namespace) -> None:
    """Raises ValueError for a U-SAM that was trained without prompts."""
    if args.model != "sam-med3d" and args.prompt_mode == 0:
        raise ValueError(
            f"{args.resume} was trained without prompts, there is nothing to click; train with "
            "--prompt_mode 1, 2, 3 or mixed"
        )


def clickable(
    model: SliceModel | VolumeModel, args: Namespace, max_seconds: float = CLICK_SECONDS
) -> Clickable:
    """A loaded model for clicks; of a volume no window is opened `max_seconds` after a click."""
    if isinstance(model, VolumeModel):

        def open_volume(scan: Scan) -> Callable[[], MarkedMask]:
            volume = volume_of(scan)
            cache = EmbeddingCache(model.model, volume.image, model.precision, MAX_CACHE_BYTES)
            return lambda: VolumeMask(cache, volume, max_seconds)

        return Clickable(model.facts["model"], True, True, True, open_volume)

    def open_slices(scan: Scan) -> Callable[[], MarkedMask]:
        slices = model.slices_of(scan, args)
        return lambda: SliceMask(slices, model.predictor)

    points, boxes = takes(args.prompt_mode)
    return Clickable(model.facts["model"], points, boxes, False, open_slices)


def scan_of_array(array: np.ndarray, spacing: tuple[float, ...], orientation: str) -> Scan:
    """A scan from an array (d0, d1, d2) as viewers store it: slices, rows, columns.

    spacing (3,) mm along the same axes. orientation: where columns, rows and slices lead, three
    letters like LPS. Its voxels (i, j, k) are the array's (d2, d1, d0). Raises ValueError for
    voxels that are not finite and impossible sizes.
    """
    path = Path("image")
    stored = np.ascontiguousarray(array).transpose(2, 1, 0)
    stored = whole_as_int16(stored)  # viewers send floats for files of integers
    affine = affine_of(orientation, spacing[::-1])
    header = ScanHeader(path, "array", stored.shape, 1, stored.dtype.name, affine)
    return Scan(narrow(path, stored), check_header(header, claimed=None, available=0))


def affine_of(orientation: str, spacing: tuple[float, ...]) -> np.ndarray:
    """(4, 4) voxel index -> RAS mm for axes that lead to `orientation`, such as LPS."""
    axcodes2ornt(orientation)
    if not all(0 < size < 1e4 for size in spacing):
        raise ValueError(f"spacing: expected three lengths in mm above 0, found {list(spacing)}")
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for axis, (letter, size) in enumerate(zip(orientation, spacing, strict=True)):
        row, sign = POSITIVE[letter]
        affine[row, axis] = sign * size
    return affine


def scan_of_file(path: Path, channel: int | None = None) -> Scan:
    """A scan read from a file or DICOM folder."""
    scan = read_scan(path, channel)
    if scan.header.affine is None:
        raise ValueError(f"{path}: no scanner coordinates; --annotate needs NIfTI, NRRD or DICOM")
    return replace(scan)
