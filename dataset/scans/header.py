"""A scan and its header as plain values, and the bounds that every header must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_VOXELS = 2**30  # four times a 512 x 512 x 1000 scan
MAX_DEFLATE_RATIO = 1040  # deflate cannot pack tighter than 1032 : 1


@dataclass(frozen=True)
class ScanHeader:
    """What a scan's header says; no patient data is ever kept.

    shape (I, J, K) voxels in file order; channels beyond the third axis; dtype as stored;
    affine (4, 4) float64 voxel index -> RAS mm, None for an npz slice; oriented is False where
    the file states no orientation (NIfTI without sform and qform) and RAS axes are guessed; sized
    is False where it states no voxel size, and 1 is put in its place. nifti: the first bytes of a
    NIfTI file, its header. remarks: what a user should know of the header, a line each.
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


@dataclass(frozen=True)
class Scan:
    """A scan as stored: array (I, J, K) in file order, and its header.

    The array is uint8, int16 or float32; an npz slice keeps its own dtype.
    """

    array: np.ndarray
    header: ScanHeader

    @property
    def path(self) -> Path:
        """Where the scan was read from."""
        return self.header.path

    @property
    def affine(self) -> np.ndarray | None:
        """(4, 4) voxel index in file order -> RAS mm; None for an npz slice."""
        return self.header.affine

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size (i, j, k) in mm, file order; None for an npz slice."""
        return self.header.spacing


def size_text(shape: tuple[int, ...]) -> str:
    """The sizes as people write them: 512 x 512 x 20."""
    return " x ".join(str(int(length)) for length in shape)


def check_header(header: ScanHeader, *, claimed: int | None, available: int) -> ScanHeader:
    """The header, once its sizes and affine are sane; claimed and available are bytes."""
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
    if not np.isfinite(header.affine).all() or abs(np.linalg.det(header.affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: affine is not finite and invertible: {header.affine.tolist()}")
    return header


def as_volume(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """(I, J, K) and the number of channels behind it; refuses images of fewer than three axes."""
    if len(shape) < 3:
        raise ValueError(f"{path}: a 2D image of {size_text(shape)}; wanted a volume")
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


def first_line(error: Exception) -> str:
    """First line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
