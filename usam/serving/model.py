"""The model of a server, and the interactive masks it creates."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt

from dataset.scans.header import Scan, ScanHeader, check_header, narrow
from dataset.scans.read import read_scan
from dataset.scans.slices import ScanSlices
from dataset.scans.volumes import volume_of
from dataset.scans.window import parse_window
from usam.prediction.slices import Predictor
from usam.prediction.windows import MAX_CACHE_BYTES, EmbeddingCache
from usam.runtime.precision import Precision
from usam.serving.objects import MarkedMask
from usam.serving.slice_mask import SliceMask, takes
from usam.serving.volume_mask import VolumeMask
from usam.weights.inference import load_for_inference
from usam.weights.sam_med3d import load_or_initialize

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
    if args.model == "sam-med3d":
        return _volumes(args, precision, saved)
    if args.prompt_mode == 0:
        raise ValueError(
            f"{args.resume} was trained without prompts, there is nothing to click; train with "
            "--prompt_mode 1, 2, 3 or mixed"
        )
    model, row_col = load_for_inference(args, precision.device, saved)
    data = saved["data"]
    window = parse_window(args.window) if args.window else None
    predictor = Predictor(
        model.eval(), precision, data, prompt_mode=args.prompt_mode, points_are_row_col=row_col
    )

    def open_slices(scan: Scan) -> Callable[[], MarkedMask]:
        slices = ScanSlices(scan, data, window=window)
        return lambda: SliceMask(slices, predictor)

    points, boxes = takes(args.prompt_mode)
    return Clickable(f"u-sam {args.sam_model}", points, boxes, False, open_slices)


def _volumes(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> Clickable:
    model = load_or_initialize(args, saved).to(precision.device).eval()

    def open_volume(scan: Scan) -> Callable[[], MarkedMask]:
        volume = volume_of(scan)
        cache = EmbeddingCache(model, volume.image, precision, MAX_CACHE_BYTES)
        return lambda: VolumeMask(cache, volume, CLICK_SECONDS)

    return Clickable(f"sam-med3d {args.sam_model}", True, True, True, open_volume)


def scan_of_array(array: np.ndarray, spacing: tuple[float, ...], orientation: str) -> Scan:
    """A scan from an array (d0, d1, d2) as viewers store it: slices, rows, columns.

    spacing (3,) mm along the same axes. orientation: where columns, rows and slices lead, three
    letters like LPS. Its voxels (i, j, k) are the array's (d2, d1, d0). Raises ValueError for
    voxels that are not finite and impossible sizes.
    """
    path = Path("image")
    stored = np.ascontiguousarray(array).transpose(2, 1, 0)
    if stored.dtype == bool:
        stored = stored.astype(np.uint8)
    elif _holds_int16(stored):  # viewers send floats for files of integers
        stored = stored.astype(np.int16)
    affine = affine_of(orientation, spacing[::-1])
    header = ScanHeader(path, "array", stored.shape, 1, stored.dtype.name, affine)
    return Scan(narrow(path, stored), check_header(header, claimed=None, available=0))


def _holds_int16(array: np.ndarray) -> bool:
    """Whether every value is a whole number that fits int16."""
    if array.dtype in (np.uint8, np.int16):
        return False
    low, high = array.min(), array.max()
    if not (np.iinfo(np.int16).min <= low and high <= np.iinfo(np.int16).max):
        return False  # NaN as well
    return array.dtype.kind != "f" or bool((array == np.rint(array)).all())


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
