"""NIfTI files: header and voxels, with the size of both bounded before anything is read."""

from __future__ import annotations

import gzip
import io
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    SHEAR_LIMIT,
    Scan,
    ScanHeader,
    as_volume,
    check_header,
    corners_apart,
    first_line,
    mm_text,
    narrow,
)

NIFTI_HEADER_BYTES = 540  # of version 2; version 1 takes 348
SLAB_BYTES = 2**25
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metres, millimetres, micrometres
SPACE_UNITS = 7  # the bits of xyzt_units that hold the unit of length
MAX_FORM_CODE = 5

# nibabel reports repaired header fields on stderr; what matters is checked here, in one line.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


class _NoExtensions(nib.nifti1.Nifti1Extensions):
    """Extensions left unread: they claim any size, and may hold a patient's name."""

    @classmethod
    def from_fileobj(cls, fileobj: Any, size: int, byteswap: bool) -> _NoExtensions:
        return cls()


class _Header1(nib.Nifti1Header):
    exts_klass = _NoExtensions


class _Header2(nib.Nifti2Header):
    exts_klass = _NoExtensions


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file whose header was read: type, offset and scale of its stored numbers."""

    header: ScanHeader
    dtype: np.dtype
    offset: int
    slope: float
    inter: float

    def voxels(self, channel: int) -> np.ndarray:
        """(I, J, K) array in Fortran order, read slab by slab so that one copy is held."""
        path = self.header.path
        rows, columns, depth = self.header.shape
        slice_bytes = rows * columns * self.dtype.itemsize
        step = max(1, SLAB_BYTES // slice_bytes)
        out = None
        with _opened(path) as stream:
            stream.seek(self.offset + channel * depth * slice_bytes)
            for first in range(0, depth, step):
                count = min(step, depth - first)
                raw = stream.read(count * slice_bytes)
                if len(raw) < count * slice_bytes:
                    raise ValueError(f"{path}: truncated; data end in slice {first} of {depth}")
                slab = np.frombuffer(raw, dtype=self.dtype)
                slab = narrow(path, self._scaled(slab.reshape(rows, columns, count, order="F")))
                if out is None:
                    out = np.empty(self.header.shape, dtype=slab.dtype, order="F")
                out[:, :, first : first + count] = slab
            if channel == self.header.channels - 1:
                stream.read(1)  # past the end: gzip compares its checksum there
        return out

    def _scaled(self, slab: np.ndarray) -> np.ndarray:
        """Stored numbers in native byte order, with the header's slope and intercept applied."""
        if self.slope == 1 and self.inter == 0:
            return slab.astype(slab.dtype.newbyteorder("="), copy=False)
        return slab.astype(np.float64) * self.slope + self.inter


def open_nifti(path: Path) -> NiftiFile:
    """A NIfTI-1 or NIfTI-2 file, compressed or not, with its header read and checked.

    Raises ValueError, in one line, for a file that is none, that claims more than it can hold, or
    whose header does not place its voxels.
    """
    with _opened(path) as stream:
        block = stream.read(NIFTI_HEADER_BYTES)
    try:
        stored = stored_header(block)
        parsed = (_Header2 if isinstance(stored, nib.Nifti2Header) else _Header1).from_fileobj(
            io.BytesIO(block + bytes(4))
        )
        if bytes(stored["magic"])[:2] != b"n+":
            raise ValueError("a header whose voxels lie in another file, .img")
        shape, dtype = parsed.get_data_shape(), parsed.get_data_dtype()
        slope, inter = parsed.get_slope_inter()
        affine, remarks, facts = _place(stored, parsed, shape)
    except Exception as error:  # nibabel raises a type of its own for every kind of damage
        raise ValueError(f"{path}: not a readable NIfTI file ({first_line(error)})") from error
    if dtype.kind not in "iuf":
        raise ValueError(f"{path}: voxels are {dtype}; expected plain numbers")
    shape, channels = as_volume(path, shape)
    header = ScanHeader(
        path, "nifti", shape, channels, dtype.name, affine, nifti=block, remarks=remarks, **facts
    )
    size, offset = path.stat().st_size, int(parsed.get_data_offset())
    available = size * MAX_DEFLATE_RATIO if _is_packed(path) else size
    claimed = math.prod(shape) * max(channels, 1) * dtype.itemsize
    header = check_header(header, claimed=claimed, available=available - offset)
    return NiftiFile(header, dtype, offset, *(1.0 if slope is None else slope, inter or 0.0))


def scan_of_image(path: Path, image: nib.spatialimages.SpatialImage, channel: int | None) -> Scan:
    """A nibabel image as a scan that is called `path`, as if it was read from its file."""
    shape, channels = as_volume(path, image.shape)
    affine, facts = np.array(image.affine, dtype=np.float64), {}
    if isinstance(image, nib.Nifti1Image):
        stored = type(image)(image.dataobj, image.affine, image.header).header  # as it is saved
        try:
            affine, remarks, facts = _place(stored, stored, image.shape)
        except Exception as error:
            raise ValueError(f"{path}: not a usable NIfTI header ({first_line(error)})") from error
        facts |= {"remarks": remarks, "nifti": stored.binaryblock}
    dtype = image.get_data_dtype().name
    header = ScanHeader(path, "array", shape, channels, dtype, affine, **facts)
    header = check_header(header, claimed=None, available=0)
    number = header.channel(channel)
    voxels = np.asanyarray(image.dataobj).reshape(*shape, channels, order="F")[..., number]
    if voxels.dtype.kind not in "iuf":
        raise ValueError(f"{path}: voxels are {voxels.dtype}; expected plain numbers")
    return Scan(narrow(path, voxels.astype(voxels.dtype.newbyteorder("="), copy=False)), header)


def stored_header(block: bytes) -> nib.Nifti1Header:
    """The NIfTI-1 or NIfTI-2 header in a file's first bytes, without any repairs.

    Extensions, which may claim any length, are left out.
    """
    is_nifti2 = 540 in (int.from_bytes(block[:4], order) for order in ("little", "big"))
    kind = nib.Nifti2Header if is_nifti2 else nib.Nifti1Header
    return kind(block[: kind.sizeof_hdr], check=False)


def _place(
    stored: nib.Nifti1Header, parsed: nib.Nifti1Header, shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[str, ...], dict[str, bool]]:
    """(affine (4, 4) index -> RAS mm, remarks on it, whether it is oriented and sized).

    stored: the fields as they stand in the file; parsed: with nibabel's repairs. The sform counts
    where it has a code, then the qform, then the voxel sizes alone. Raises ValueError for codes,
    units and voxel sizes that NIfTI does not know.
    """
    codes = {name: int(stored[f"{name}_code"]) for name in ("sform", "qform")}
    for name, code in codes.items():
        if not 0 <= code <= MAX_FORM_CODE:
            raise ValueError(f"{name}_code {code} is not between 0 and {MAX_FORM_CODE}")
    unit = int(stored["xyzt_units"]) & SPACE_UNITS
    if unit not in MM_PER_UNIT:
        raise ValueError(f"xyzt_units names the unit {unit}; expected m, mm or micrometres")
    sizes = np.array(stored["pixdim"][1:4], dtype=np.float64)
    used = "sform" if codes["sform"] else "qform" if codes["qform"] else "pixdim"
    if used != "sform":
        _check_sizes(sizes, float(stored["pixdim"][0]))
    to_mm = np.diag([MM_PER_UNIT[unit]] * 3 + [1.0])
    affine = to_mm @ np.array(parsed.get_best_affine(), dtype=np.float64)
    facts = {"oriented": used != "pixdim", "sized": used == "sform" or bool(sizes.all())}
    if used != "sform" or len(shape) < 3:
        return affine, (), facts
    others = {"voxel sizes (pixdim)": _resized(affine, sizes * MM_PER_UNIT[unit])}
    if codes["qform"] and _is_usable(sizes, stored):
        others = {"qform": to_mm @ np.array(parsed.get_qform(), dtype=np.float64)}
    limit = max(SHEAR_LIMIT, 0.01 * float(np.linalg.norm(affine[:3, :3], axis=0).min()))
    remarks = []
    for name, other in others.items():
        apart = corners_apart(affine, other, shape) if np.isfinite(affine).all() else 0.0
        if not np.isfinite(apart):
            remarks.append(f"its {name} holds NaN or infinity; sform used")
        elif apart > limit:
            remarks.append(f"sform and {name} put voxels up to {apart:.3g} mm apart; sform used")
    return affine, tuple(remarks), facts


def _check_sizes(sizes: np.ndarray, qfac: float) -> None:
    """Raises ValueError for unusable voxel sizes; 0 stands for "unknown"."""
    if not np.isfinite(sizes).all() or (sizes < 0).any():
        raise ValueError(f"voxel sizes {mm_text(sizes)} (pixdim) must not be negative or NaN")
    if qfac < 0 and qfac != -1:
        raise ValueError(f"pixdim[0] is {qfac:g}; expected 1 or -1")


def _is_usable(sizes: np.ndarray, stored: nib.Nifti1Header) -> bool:
    """Whether a qform can be made of the header's fields."""
    turn = np.array([float(stored[f"quatern_{axis}"]) for axis in "bcd"])
    return bool(np.isfinite(sizes).all() and (sizes > 0).all() and turn @ turn <= 1 + 1e-6)


def _resized(affine: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The affine with other voxel sizes: ITK takes sizes from pixdim and axes from the sform."""
    other = affine.copy()
    other[:3, :3] *= sizes / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-30)
    return other


def _is_packed(path: Path) -> bool:
    """Whether a file is gzip data, whatever its name says."""
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if gzip; damage inside becomes a one-line ValueError."""
    opener = gzip.open if _is_packed(path) else open
    try:
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged gzip data ({first_line(error)})") from error
