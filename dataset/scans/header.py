"""A scan and its header as plain values, and limits that every header must meet."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

MAX_VOXELS = 2**30  # four times a 512 x 512 x 1000 scan
MAX_DEFLATE_RATIO = 1040  # deflate cannot pack tighter than 1032 : 1
SHEAR_LIMIT = 0.05  # mm at the corners: below it slices count as perpendicular to their axis
PLAUSIBLE_MM = (0.01, 50.0)  # sides of a voxel


@dataclass(frozen=True)
class ScanHeader:
    """The header of a scan; patient data is never kept.

    shape (I, J, K) voxels in file order; channels: volumes in the file; dtype as stored;
    affine (4, 4) float64 voxel index -> RAS mm, None for an npz slice; oriented is False where
    the file states no orientation and its axes are guessed; sized is False where it states no
    voxel size, and 1 stands in its place. nifti: the first bytes of a NIfTI file, its header.
    remarks: what a user should know about the header, one line each.
    """

    path: Path
    format: str
    shape: tuple[int, int, int]
    channels: int
    dtype: str
    affine: np.ndarray | None
    oriented: bool = True
    sized: bool = True
    nifti: bytes | None = None
    remarks: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size (i, j, k) in mm, file order; None where the file states none."""
        if self.affine is None or not self.sized:
            return None
        return tuple(float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float | None:
        """Volume of a voxel in ml; None where the file states no voxel size."""
        if self.spacing is None:
            return None
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    def channel(self, chosen: int | None) -> int:
        """The number of the volume to read; ValueError if none is chosen of several."""
        if chosen is None and self.channels > 1:
            raise ValueError(
                f"{self.path}: holds {self.channels} volumes; choose one with --channel (0 to "
                f"{self.channels - 1})"
            )
        chosen = chosen or 0
        if not 0 <= chosen < self.channels:
            raise ValueError(
                f"{self.path}: no channel {chosen}; channels are 0 to {self.channels - 1}"
            )
        return chosen

    def with_remarks(self, *lines: str) -> ScanHeader:
        """The header with further remarks."""
        return replace(self, remarks=(*self.remarks, *lines))


@dataclass(frozen=True)
class Scan:
    """A scan as stored: array (I, J, K) in file order, and its header.

    The array is uint8, int16 or float32; an npz slice keeps its own dtype.
    """

    array: np.ndarray
    header: ScanHeader

    @property
    def path(self) -> Path:
        """The file or folder that the scan was read from."""
        return self.header.path

    @cached_property
    def is_constant(self) -> bool:
        """Whether all voxels have one value."""
        return bool(self.array.min() == self.array.max())

    @property
    def affine(self) -> np.ndarray | None:
        """(4, 4) voxel index in file order -> RAS mm; None for an npz slice."""
        return self.header.affine

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size (i, j, k) in mm, file order; None where it is not known."""
        return self.header.spacing


def size_text(shape: tuple[int, ...]) -> str:
    """The sizes as text: 512 x 512 x 20."""
    return " x ".join(str(int(length)) for length in shape)


def mm_text(sizes: np.ndarray | tuple[float, ...]) -> str:
    """Lengths as text: 0.8 x 0.8 x 2.5 mm."""
    return " x ".join(f"{float(size):.4g}" for size in sizes) + " mm"


def check_header(header: ScanHeader, *, claimed: int | None, available: int) -> ScanHeader:
    """The header with remarks on its geometry, if its sizes and affine are possible.

    claimed and available: bytes of voxels. Raises ValueError for absurd sizes and for an affine
    that is not finite or not invertible.
    """
    path, voxels = header.path, math.prod(header.shape)
    if min(header.shape) < 1 or voxels > MAX_VOXELS:
        raise ValueError(
            f"{path}: header claims {size_text(header.shape)} voxels; at most 2^30 are read"
        )
    if claimed is not None and claimed > available:
        raise ValueError(
            f"{path}: header claims {claimed} bytes of voxels, the file can hold {available};"
            " it is truncated or damaged"
        )
    if header.affine is None:
        return header
    _check_affine(path, header.affine)
    return header.with_remarks(*_place_remarks(header))


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """Raises ValueError unless the affine is finite and invertible."""
    if not np.isfinite(affine).all():
        raise ValueError(f"{path}: the header's voxel-to-mm matrix holds NaN or infinity")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if sizes.min() == 0 or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-6:
        raise ValueError(
            f"{path}: the header's voxel-to-mm matrix is singular: {affine[:3].tolist()}"
        )


def _place_remarks(header: ScanHeader) -> list[str]:
    """A line for a missing orientation or size, for sheared slices and for absurd voxel sizes."""
    lines = []
    if not header.oriented:
        lines.append("states no orientation; the axes of its voxels are guessed")
    if not header.sized:
        lines.append("states no voxel size; volumes are given in voxels, not in ml")
        return lines
    low, high = min(header.spacing), max(header.spacing)
    if low < PLAUSIBLE_MM[0] or high > PLAUSIBLE_MM[1]:
        lines.append(f"voxels of {mm_text(header.spacing)}: is the unit in its header right?")
    if shear_mm(header.affine, header.shape) > SHEAR_LIMIT:
        lines.append(
            f"gantry tilt or shear of {shear_degrees(header.affine):.1f} degrees: ITK-based viewers"
            " (3D Slicer, ITK-SNAP) cannot show its label map in the right position; nibabel can"
        )
    return lines


def without_shear(affine: np.ndarray) -> np.ndarray:
    """The affine with its axes replaced by the nearest perpendicular ones, as a qform has them."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    u, _, v = np.linalg.svd(affine[:3, :3] / sizes)
    straight = affine.copy()
    straight[:3, :3] = (u @ v) * sizes
    return straight


def shear_mm(affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far a corner voxel of a grid lies from where it would lie without shear, in mm."""
    return corners_apart(affine, without_shear(affine), shape)


def shear_degrees(affine: np.ndarray) -> float:
    """The largest difference from a right angle between two axes, in degrees."""
    i, j, k = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).T
    cosines = np.abs([i @ j, j @ k, i @ k]).clip(max=1)
    return float(np.degrees(np.arcsin(cosines)).max())


def corners_apart(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance, in mm, between a grid's corner voxels under two affines."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape[:3]) - 1)
    apart = corners @ (first - second)[:3, :3].T + (first - second)[:3, 3]
    return float(np.linalg.norm(apart, axis=1).max())


def as_volume(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """(I, J, K) and the number of volumes behind it; refuses images of fewer than three axes."""
    if len(shape) < 3:
        raise ValueError(f"{path}: a 2D image of {size_text(shape)}; expected a volume")
    i, j, k = (int(length) for length in shape[:3])
    return (i, j, k), int(math.prod(shape[3:]))


def narrow(path: Path, array: np.ndarray) -> np.ndarray:
    """uint8 and int16 as they are, int8 as int16, all else as finite float32."""
    if array.dtype == np.uint8 or array.dtype == np.int16:
        return array
    if array.dtype == np.int8:
        return array.astype(np.int16)
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(np.float32, copy=False)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ValueError(f"{path}: {bad} voxels are NaN or infinite; repair the file first")
    return array


def whole_as_int16(array: np.ndarray) -> np.ndarray:
    """bool as uint8; whole numbers that fit as int16, as the files hold that they come from."""
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype in (np.uint8, np.int16) or not array.size:
        return array
    low, high = array.min(), array.max()
    if not (np.iinfo(np.int16).min <= low and high <= np.iinfo(np.int16).max):
        return array  # NaN as well
    is_whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())
    return array.astype(np.int16) if is_whole else array


def first_line(error: Exception) -> str:
    """First line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
