"""NIfTI files: header and voxels, with the size of both bounded before anything is read."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    ScanHeader,
    as_volume,
    check_header,
    first_line,
    narrow,
)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
NIFTI_HEADER_BYTES = 540  # of version 2; version 1 takes 348
SLAB_BYTES = 2**25

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


class _Nifti1(nib.Nifti1Image):
    header_class = _Header1


class _Nifti2(nib.Nifti2Image):
    header_class = _Header2


def stored_header(block: bytes) -> nib.Nifti1Header:
    """The NIfTI-1 or NIfTI-2 header in a file's first bytes, as it stands there, nothing repaired.

    Extensions, which may claim any length, are left out.
    """
    is_nifti2 = 540 in (int.from_bytes(block[:4], order) for order in ("little", "big"))
    kind = nib.Nifti2Header if is_nifti2 else nib.Nifti1Header
    return kind(block[: kind.sizeof_hdr], check=False)


def nifti_header(path: Path) -> tuple[ScanHeader, Any]:
    """Header and nibabel's lazy array proxy (offset, dtype, slope, inter)."""
    try:
        with _opened(path) as stream:
            block = stream.read(NIFTI_HEADER_BYTES)
            is_nifti2 = 540 in (int.from_bytes(block[:4], order) for order in ("little", "big"))
        image = (_Nifti2 if is_nifti2 else _Nifti1).from_filename(path)
        proxy, affine = image.dataobj, np.array(image.affine, dtype=np.float64)
        coded = int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    except Exception as error:  # nibabel raises a type of its own for every kind of damage
        raise ValueError(f"{path}: not a readable NIfTI file ({first_line(error)})") from error
    if proxy.dtype.kind not in "iuf":
        raise ValueError(f"{path}: voxels are {proxy.dtype}; wanted plain numbers")
    shape, channels = as_volume(path, proxy.shape)
    header = ScanHeader(
        path, "nifti", shape, channels, proxy.dtype.name, affine, coded, nifti=block
    )
    size = path.stat().st_size
    available = size * MAX_DEFLATE_RATIO if path.name.lower().endswith(".gz") else size
    claimed = math.prod(shape) * max(channels, 1) * proxy.dtype.itemsize
    return check_header(header, claimed=claimed, available=available - int(proxy.offset)), proxy


def nifti_voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    """(I, J, K) array in Fortran order, read slab by slab so that one copy is held."""
    proxy = nifti_header(path)[1]
    rows, columns, depth = header.shape
    slice_bytes = rows * columns * proxy.dtype.itemsize
    step = max(1, SLAB_BYTES // slice_bytes)
    out = None
    with _opened(path) as stream:
        stream.seek(int(proxy.offset) + channel * depth * slice_bytes)
        for first in range(0, depth, step):
            count = min(step, depth - first)
            raw = stream.read(count * slice_bytes)
            if len(raw) < count * slice_bytes:
                raise ValueError(f"{path}: truncated; data end in slice {first} of {depth}")
            slab = np.frombuffer(raw, dtype=proxy.dtype).reshape(rows, columns, count, order="F")
            slab = narrow(path, _scaled(slab, proxy))
            if out is None:
                out = np.empty(header.shape, dtype=slab.dtype, order="F")
            out[:, :, first : first + count] = slab
        if channel == header.channels - 1:
            stream.read(1)  # past the end: gzip compares its checksum there
    return out


def _scaled(slab: np.ndarray, proxy: Any) -> np.ndarray:
    """Stored numbers in native byte order, with the header's slope and intercept applied."""
    slope, inter = float(proxy.slope), float(proxy.inter)
    if slope == 1 and inter == 0:
        return slab.astype(slab.dtype.newbyteorder("="), copy=False)
    return slab.astype(np.float64) * slope + inter


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if gzip; damage inside becomes a one-line ValueError."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged gzip data ({first_line(error)})") from error
