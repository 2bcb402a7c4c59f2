"""Conversion between a scan's own axes and upright ones, and comparison of two geometries."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from dataset.scans.header import Scan, ScanHeader, size_text

LPS = nib.orientations.axcodes2ornt("LPS")


@dataclass(frozen=True)
class SliceStack:
    """Canonical slices (S, H, W): axes z to Superior, y to Posterior, x to Left.

    spacing (z, y, x) in mm, None where it is not known; affine (4, 4) from the index (x, y, z) to
    RAS mm, None for an npz slice. With orientation "stored" (CARE) the slices are transposed, axes
    z, x, y.
    """

    slices: np.ndarray
    spacing: tuple[float, float, float] | None
    affine: np.ndarray | None


def turn_to_lps(affine: np.ndarray) -> np.ndarray:
    """nibabel's orientation transform (3, 2) from a scan's own axes to the nearest LPS axes."""
    return nib.orientations.ornt_transform(nib.io_orientation(affine), LPS)


def turn_from_lps(affine: np.ndarray) -> np.ndarray:
    """nibabel's orientation transform (3, 2) from LPS axes back to a scan's own."""
    return nib.orientations.ornt_transform(LPS, nib.io_orientation(affine))


def lps_affine(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(4, 4) from voxel indices in LPS order to RAS mm, for a scan of `shape`."""
    return affine @ nib.orientations.inv_ornt_aff(turn_to_lps(affine), shape)


def to_canonical(scan: Scan, orientation: str = "LPS") -> SliceStack:
    """The scan as slices in the canonical frame; a view, nothing is resampled.

    An oblique scan takes the nearest axes. orientation "stored" transposes each slice, as the
    CARE release stores them: an npz slice (X, Y) then comes out as released, and upright with
    "LPS". The inverse is from_canonical.
    """
    if scan.affine is None:
        return SliceStack(_oriented(scan.array, orientation), None, None)
    array = nib.apply_orientation(scan.array, turn_to_lps(scan.affine))
    affine = lps_affine(scan.affine, scan.array.shape)
    spacing = None
    if scan.header.sized:
        x, y, z = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
        spacing = (z, x, y) if orientation == "stored" else (z, y, x)
    return SliceStack(_oriented(array, orientation), spacing, affine)


def from_canonical(slices: np.ndarray, scan: Scan, orientation: str = "LPS") -> np.ndarray:
    """Slices (S, H, W) of any dtype back in the scan's own axes, (I, J, K); a view.

    Exact inverse of to_canonical. Raises ValueError if the sizes are not the scan's.
    """
    array = _oriented(slices, orientation, back=True)
    if scan.affine is not None:
        array = nib.apply_orientation(array, turn_from_lps(scan.affine))
    if array.shape != scan.array.shape:
        raise ValueError(f"{scan.path}: slices give {array.shape}, the scan is {scan.array.shape}")
    return array


def geometry_difference(first: ScanHeader, second: ScanHeader) -> str:
    """How the geometry of two scans differs, with both affines; empty if it agrees.

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
    if first.spacing is None or second.spacing is None:
        return ""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*shapes[0], 1]
    apart = np.abs((volumes[0].affine - volumes[1].affine) @ corners.T).max()
    if apart <= 0.1 * min(volumes[0].spacing):
        return ""
    affines = " and ".join(str(volume.affine[:3].round(3).tolist()) for volume in volumes)
    return f"affines differ by {apart:.3g} mm: {affines}"


def _oriented(array: np.ndarray, orientation: str, *, back: bool = False) -> np.ndarray:
    """(x, y, z) to slices (z, y, x), or (z, x, y) if "stored"; the inverse if `back`."""
    if orientation == "LPS":
        return array.transpose(2, 1, 0)
    if orientation == "stored":
        return array.transpose((1, 2, 0) if back else (2, 0, 1))
    raise ValueError(f"orientation {orientation!r} is not known; wanted LPS or stored")
