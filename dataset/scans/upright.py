"""A scan becomes upright uint8 slices, and a label map of slices the scan's own geometry again.

Preparation, `verify` and prediction share every step here: read, orient, crop, window, resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np

from dataset.scans.files import read_file
from dataset.scans.header import Scan, ScanHeader, size_text

Window = tuple[float, float] | str | None
Box = tuple[int, int, int, int]  # y0, y1, x0, x1 of canonical slices; ends excluded

WINDOWS = {
    "abdomen": (-160.0, 240.0),
    "soft_tissue": (-150.0, 250.0),
    "liver": (-45.0, 105.0),
    "mediastinum": (-125.0, 225.0),
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "brain": (0.0, 80.0),
}
PERCENTILES = (0.5, 99.5)
MAX_SAMPLED = 2**24  # voxels that percentiles are taken from
STORED_RANGE = (0.0, 1.0)  # CARE's own scale, for a store without a window
BODY_HU = -300.0
LPS = nib.orientations.axcodes2ornt("LPS")


@dataclass(frozen=True)
class Volume:
    """Canonical slices (S, H, W): axes z to Superior, y to Posterior, x to Left.

    spacing (z, y, x) in mm; affine (4, 4) from the index (x, y, z) to RAS mm; both None for an
    npz slice. With orientation "stored" (CARE) the slices are transposed, axes z, x, y.
    """

    slices: np.ndarray
    spacing: tuple[float, float, float] | None
    affine: np.ndarray | None


def read_scan(path: str | Path, channel: int | None = None) -> Scan:
    """A scan in file order: NIfTI, a DICOM series folder, NRRD or a CARE npz.

    array (I, J, K) is uint8, int16 or float32, in HU for CT; an npz slice comes as (X, Y, 1) with
    affine None. Raises FileNotFoundError, or ValueError with one line: unknown or unreadable
    format, 2D, several channels and none chosen, absurd header, truncation, NaN or infinity.
    """
    return read_file(path, channel)


def read_label(path: str | Path, num_classes: int = 256) -> Scan:
    """A label map in file order, uint8 (I, J, K) in [0, num_classes).

    Raises what read_scan raises, and ValueError, naming the ids, for fractional or unknown labels.
    """
    scan = read_file(path)
    stored = scan.array
    if stored.dtype.kind == "f" and not np.array_equal(np.rint(stored), stored):
        odd = np.unique(stored[np.rint(stored) != stored])[:5]
        raise ValueError(f"{path}: labels are not whole numbers: {_listed(odd)}")
    if stored.min() < 0 or stored.max() >= num_classes:
        ids = np.unique(stored[(stored < 0) | (stored >= num_classes)])[:5]
        raise ValueError(
            f"{path}: label ids outside the table of {num_classes} classes (background "
            f"included): {_listed(ids)}"
        )
    return Scan(stored.astype(np.uint8, order="K", copy=False), scan.header)


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{float(value):g}" for value in values)


def to_canonical(scan: Scan, orientation: str = "LPS") -> Volume:
    """The scan as slices in the canonical frame; a view, nothing is resampled.

    An oblique scan takes the nearest axes. orientation "stored" transposes each slice, as the
    CARE release stores them: an npz slice (X, Y) then comes out as released, and upright with
    "LPS". The inverse is from_canonical.
    """
    if scan.affine is None:
        return Volume(_oriented(scan.array, orientation), None, None)
    turn = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), LPS)
    array = nib.apply_orientation(scan.array, turn)
    affine = scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.array.shape)
    x, y, z = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    spacing = (z, x, y) if orientation == "stored" else (z, y, x)
    return Volume(_oriented(array, orientation), spacing, affine)


def from_canonical(slices: np.ndarray, scan: Scan, orientation: str = "LPS") -> np.ndarray:
    """Slices (S, H, W) of any dtype back in the scan's own axes, (I, J, K); a view.

    Exact inverse of to_canonical. Raises ValueError if the sizes are not the scan's.
    """
    array = _oriented(slices, orientation, back=True)
    if scan.affine is not None:
        turn = nib.orientations.ornt_transform(LPS, nib.io_orientation(scan.affine))
        array = nib.apply_orientation(array, turn)
    if array.shape != scan.array.shape:
        raise ValueError(f"{scan.path}: slices give {array.shape}, the scan is {scan.array.shape}")
    return array


def geometry_difference(first: ScanHeader, second: ScanHeader) -> str:
    """How two scans differ in place, with both affines; empty if voxels lie on voxels.

    Both are turned to the canonical frame first, so a mere change of axes is no difference.
    Corners may be a tenth of the smallest voxel side apart.
    """
    volumes = [
        to_canonical(Scan(np.broadcast_to(np.uint8(0), header.shape), header))
        for header in (first, second)
    ]
    shapes = [volume.slices.shape[::-1] for volume in volumes]
    if shapes[0] != shapes[1]:
        return f"shapes differ: {size_text(shapes[0])} and {size_text(shapes[1])} (x, y, z)"
    if first.affine is None or second.affine is None:
        return ""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*shapes[0], 1]
    apart = np.abs((volumes[0].affine - volumes[1].affine) @ corners.T).max()
    if apart <= 0.1 * min(volumes[0].spacing):
        return ""
    affines = " and ".join(str(volume.affine[:3].round(3).tolist()) for volume in volumes)
    return f"affines differ by {apart:.3g} mm: {affines}"


def _oriented(array: np.ndarray, orientation: str, *, back: bool = False) -> np.ndarray:
    """(x, y, z) to slices (z, y, x), or (z, x, y) if "stored"; the way back with back."""
    if orientation == "LPS":
        return array.transpose(2, 1, 0)
    if orientation == "stored":
        return array.transpose((1, 2, 0) if back else (2, 0, 1))
    raise ValueError(f"orientation {orientation!r} is not known; wanted LPS or stored")


def parse_window(words: Sequence[str | float]) -> Window:
    """A window from command-line words: LOW HIGH, a preset of WINDOWS, or "percentile".

    Raises ValueError naming the choices.
    """
    if len(words) == 1 and words[0] == "percentile":
        return "percentile"
    if len(words) == 1 and words[0] in WINDOWS:
        return WINDOWS[words[0]]
    try:
        low, high = (float(word) for word in words)
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"window {' '.join(map(str, words))} is not known; wanted LOW HIGH, percentile or one"
            f" of {', '.join(WINDOWS)}"
        )
    return low, high


def window_limits(slices: np.ndarray, window: Window) -> tuple[float, float]:
    """(low, high) in the scan's units; "percentile" takes 0.5 and 99.5 % of the volume.

    Percentiles come from at most 2^24 voxels on a regular in-plane grid. None is CARE's [0, 1].
    """
    if window is None:
        return STORED_RANGE
    if window != "percentile":
        return parse_window([window] if isinstance(window, str) else list(window))
    step = math.ceil(math.sqrt(slices.size / MAX_SAMPLED))
    low, high = np.percentile(slices[:, ::step, ::step], PERCENTILES)
    return float(low), float(high)


def apply_window(slices: np.ndarray, window: Window) -> np.ndarray:
    """uint8 slices (S, H, W): low and below is 0, high and above 255, rounded in between.

    Works slice by slice, so a float copy of one slice is all it holds beside the result. Without
    a window [0, 1] is truncated instead, as the CARE release is packed.
    """
    if window is None:
        return (np.clip(slices.astype(np.float64), *STORED_RANGE) * 255).astype(np.uint8)
    low, high = window_limits(slices, window)
    scale = 255.0 / max(high - low, 1e-6)
    out = np.empty(slices.shape, dtype=np.uint8)
    for k, plane in enumerate(slices):
        scaled = plane.astype(np.float32)
        scaled -= np.float32(low)
        scaled *= np.float32(scale)
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        out[k] = scaled
    return out


def body_box(slices: np.ndarray, window: Window, margin: int = 8) -> Box:
    """Smallest in-plane box (y0, y1, x0, x1) that holds the patient in every slice.

    slices in the scan's units. In each slice the largest piece above -300 HU counts, so that the
    table is left out; with "percentile", above a tenth of the window. margin in pixels.
    """
    low, high = window_limits(slices, window)
    threshold = low + 0.1 * (high - low) if window in ("percentile", None) else BODY_HU
    step = 4  # a coarse grid is enough for a box with a margin
    height, width = slices.shape[1:]
    found = []
    for plane in slices[:, ::step, ::step]:
        solid = cv2.morphologyEx(
            (plane > threshold).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)
        )
        pieces = cv2.connectedComponentsWithStats(solid)[2][1:]
        if len(pieces):
            x, y, w, h, _ = pieces[pieces[:, cv2.CC_STAT_AREA].argmax()]
            found.append((y, y + h, x, x + w))
    if not found:
        return 0, height, 0, width
    y0, _, x0, _ = np.min(found, axis=0) * step - margin
    _, y1, _, x1 = np.max(found, axis=0) * step + margin
    return max(int(y0), 0), min(int(y1), height), max(int(x0), 0), min(int(x1), width)


def crop(volume: Volume, box: Box) -> Volume:
    """The volume inside an in-plane box; a view, with the affine moved along."""
    y0, y1, x0, x1 = box
    affine = volume.affine
    if affine is not None:
        affine = affine @ nib.affines.from_matvec(np.eye(3), (x0, y0, 0))
    return replace(volume, slices=volume.slices[:, y0:y1, x0:x1], affine=affine)


def resample_in_plane(volume: Volume, target: float, *, labels: bool = False) -> Volume:
    """Slices resampled to about `target` mm a pixel, LPS orientation; sizes are whole pixels.

    Images (uint8) are averaged when they shrink and interpolated when they grow; labels take the
    nearest pixel. Pixel grids share their outer edges, so F.interpolate with
    align_corners=False leads back. Raises ValueError without a spacing, or for an absurd size.
    """
    if volume.spacing is None:
        raise ValueError("a release without spacing cannot be resampled; leave --spacing out")
    count, height, width = volume.slices.shape
    z, y, x = volume.spacing
    new_height, new_width = (max(1, round(n * mm / target)) for n, mm in ((height, y), (width, x)))
    if max(new_height, new_width) > 8192:
        raise ValueError(f"--spacing {target} gives slices of {new_height} x {new_width} pixels")
    if (new_height, new_width) == (height, width):
        return volume
    shrinks = new_height <= height and new_width <= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = np.empty((count, new_height, new_width), dtype=volume.slices.dtype)
    for k, plane in enumerate(volume.slices):
        cv2.resize(
            np.ascontiguousarray(plane),
            (new_width, new_height),
            dst=out[k],
            interpolation=cv2.INTER_NEAREST_EXACT if labels else how,
        )
    grow = np.array([width / new_width, height / new_height, 1.0])
    affine = volume.affine @ nib.affines.from_matvec(np.diag(grow), (grow - 1) / 2)
    return Volume(out, (z, y * height / new_height, x * width / new_width), affine)
