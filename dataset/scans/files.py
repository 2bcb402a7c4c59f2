"""One reader per scan format: NIfTI, DICOM series, NRRD and the CARE release's npz slices.

Headers are read and bounded before any voxel is; dataset.scans hands the result on to preparation
and prediction, dataset.verify uses the headers alone.
"""

from __future__ import annotations

import gzip
import logging
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    Scan,
    ScanHeader,
    as_volume,
    check_header,
    narrow,
    size_text,
)
from dataset.scans.itk import ITK_SUFFIXES, dicom_header, dicom_voxels, itk_header, itk_voxels
from dataset.store.slices import HEADER_BYTES, npy_header

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".npz")
SLAB_BYTES = 2**25
NIFTI_HEADER_BYTES = 540  # of version 2; version 1 takes 348
NUMPYS_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError)

# nibabel reports repaired header fields on stderr; what matters is checked here, in one line.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def scan_stem(path: Path) -> str:
    """Name of a scan file without its scan suffix (.nii.gz counts as one), or of its folder."""
    for suffix in SCAN_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def read_header(path: str | Path) -> ScanHeader:
    """Header of a scan: a NIfTI, NRRD or npz file, or a folder with one DICOM series.

    Raises FileNotFoundError for a missing path and ValueError, with one line, for an unknown
    format, a 2D image, an absurd size (over 2^30 voxels, or more than the file could hold), or an
    affine that is not finite or not invertible.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such scan")
    name = path.name.lower()
    if path.is_dir():
        return dicom_header(path)
    if name.endswith(NIFTI_SUFFIXES):
        return _nifti_header(path)[0]
    if name.endswith(ITK_SUFFIXES):
        return itk_header(path)
    if name.endswith(".npz"):
        return _npz_header(path)
    raise ValueError(
        f"{path}: not a scan; wanted {', '.join(SCAN_SUFFIXES)} or a DICOM series folder"
    )


def read_file(path: str | Path, channel: int | None = None) -> Scan:
    """Whole scan in file order; channel picks one volume of a file that holds several.

    Raises what read_header raises, and ValueError for a missing or wrong channel, truncated or
    corrupt data and voxels that are not finite.
    """
    path = Path(path)
    header = read_header(path)
    if channel is None and header.channels > 1:
        raise ValueError(f"{path}: holds {header.channels} channels; choose one with --channel")
    channel = channel or 0
    if not 0 <= channel < header.channels:
        raise ValueError(f"{path}: no channel {channel}; it has {header.channels}, from 0")
    readers = {
        "nifti": _nifti_voxels,
        "dicom": dicom_voxels,
        "nrrd": itk_voxels,
        "npz": _npz_voxels,
    }
    try:
        array = readers[header.format](path, header, channel)
    except MemoryError as error:
        raise ValueError(
            f"{path}: not enough memory for {size_text(header.shape)} voxels"
        ) from error
    return Scan(array, header)


# NIfTI


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


def _nifti_header(path: Path) -> tuple[ScanHeader, Any]:
    """Header and nibabel's lazy array proxy (offset, dtype, slope, inter)."""
    try:
        with _opened(path) as stream:
            block = stream.read(NIFTI_HEADER_BYTES)
            is_nifti2 = 540 in (int.from_bytes(block[:4], order) for order in ("little", "big"))
        image = (_Nifti2 if is_nifti2 else _Nifti1).from_filename(path)
        proxy, affine = image.dataobj, np.array(image.affine, dtype=np.float64)
        coded = int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    except Exception as error:  # nibabel raises a type of its own for every kind of damage
        raise ValueError(f"{path}: not a readable NIfTI file ({_line(error)})") from error
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


def _nifti_voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    """(I, J, K) array in Fortran order, read slab by slab so that one copy is held."""
    proxy = _nifti_header(path)[1]
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
        raise ValueError(f"{path}: truncated or damaged gzip data ({_line(error)})") from error


def _line(error: Exception) -> str:
    """First line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# The CARE release's slices


def _npz_header(path: Path) -> ScanHeader:
    """Header of the member `image`, (X, Y): one slice, stored transposed, as (X, Y, 1)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("image.npy").compress_type not in NUMPYS_COMPRESSIONS:
                raise ValueError("image is compressed in a way numpy never writes")
            with archive.open("image.npy") as stream:
                shape, _, dtype, _ = npy_header(stream.read(HEADER_BYTES))
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, *_ZIP_ERRORS) as error:
        raise ValueError(f"{path}: not a CARE slice ({_line(error)})") from error
    if len(shape) != 2 or dtype.kind not in "iufb":
        raise ValueError(
            f"{path}: image is {size_text(shape):.80} {dtype!s:.40}; wanted a 2D array of numbers"
        )
    header = ScanHeader(path, "npz", (*shape, 1), 1, dtype.name, None)
    claimed = math.prod(shape) * dtype.itemsize
    return check_header(header, claimed=claimed, available=path.stat().st_size * MAX_DEFLATE_RATIO)


def _npz_voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    del channel  # one image a file
    try:
        with np.load(path, allow_pickle=False) as archive:
            image = archive["image"]
    except (OSError, EOFError, ValueError, RuntimeError, *_ZIP_ERRORS) as error:
        raise ValueError(f"{path}: not a readable CARE slice ({_line(error)})") from error
    narrow(path, image)  # finite; kept as it is, so that it is scaled as it was packed
    return image[:, :, None]
