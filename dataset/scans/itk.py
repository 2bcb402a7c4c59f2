"""DICOM series and NRRD files, read through the optional package SimpleITK.

dataset.scan_files hands such paths on; nothing but geometry and voxels is ever taken from them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    ScanHeader,
    as_volume,
    check_header,
    narrow,
)

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha")
RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def _simpleitk() -> Any:
    """The module, imported when first needed; ValueError with the remedy where it is missing."""
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError(
            "DICOM and NRRD need the optional package SimpleITK: pip install SimpleITK"
        ) from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _information(path: Path) -> Any:
    """SimpleITK reader of one file with its header read; errors never quote DICOM tags."""
    reader = _simpleitk().ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path}: SimpleITK cannot read its header") from error
    return reader


def _itk_affine(reader: Any) -> np.ndarray:
    """(4, 4) index -> RAS mm from an ITK header, which is in LPS."""
    dims = reader.GetDimension()
    direction = np.array(reader.GetDirection(), dtype=np.float64).reshape(dims, dims)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    return RAS_FROM_LPS @ affine


def itk_header(path: Path) -> ScanHeader:
    """Header of an NRRD or MetaImage file; raises ValueError for what cannot be a volume."""
    reader = _information(path)
    size = tuple(reader.GetSize())
    shape, channels = as_volume(path, size)
    channels *= reader.GetNumberOfComponents()
    dtype = _simpleitk().GetPixelIDValueAsString(reader.GetPixelID())
    affine = _itk_affine(reader)
    header = ScanHeader(path, "nrrd", shape, channels, dtype, affine)
    attached = path.suffix.lower() != ".nhdr"
    claimed = math.prod(shape) * channels if attached else None  # at least a byte a voxel
    return check_header(header, claimed=claimed, available=path.stat().st_size * MAX_DEFLATE_RATIO)


def itk_voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    """(I, J, K) voxels of one channel of a file; vector components count before repeats."""
    sitk = _simpleitk()
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: SimpleITK cannot read its voxels") from error
    i, j, k = header.shape
    components = image.GetNumberOfComponentsPerPixel()
    stored = sitk.GetArrayViewFromImage(image).reshape(-1, k, j, i, components)
    repeat, component = divmod(channel, components)
    return _native(path, stored[repeat, ..., component])


def _native(path: Path, stored: np.ndarray) -> np.ndarray:
    """ITK's (K, J, I) as (I, J, K), copied out of ITK's memory and narrowed."""
    if stored.dtype.kind in "iu" and stored.min() >= -32768 and stored.max() <= 32767:
        stored = stored.astype(np.uint8 if stored.dtype == np.uint8 else np.int16)
    return np.array(narrow(path, stored)).transpose(2, 1, 0)


def _series_files(path: Path) -> tuple[str, ...]:
    """Files of the only DICOM series in a folder, ordered by position."""
    series_reader = _simpleitk().ImageSeriesReader
    series = series_reader.GetGDCMSeriesIDs(str(path))
    if not series:
        raise ValueError(f"{path}: holds no DICOM series")
    if len(series) > 1:
        raise ValueError(f"{path}: holds {len(series)} DICOM series; give each its own folder")
    return series_reader.GetGDCMSeriesFileNames(str(path), series[0])


def dicom_header(path: Path) -> ScanHeader:
    """Header of the one DICOM series in a folder, its slice step taken from the positions.

    Raises ValueError for none or several series, mixed sizes and uneven gaps between slices.
    """
    files = _series_files(path)
    readers = [_information(Path(name)) for name in files]
    first, count = readers[0], len(files)
    (rows, columns, depth), channels = as_volume(path, (*first.GetSize(), 1)[:3])
    if len({reader.GetSize() for reader in readers}) > 1:
        raise ValueError(f"{path}: images of different sizes in one DICOM series")
    affine = _itk_affine(first)
    if count > 1:
        origins = np.array([_itk_affine(reader)[:3, 3] for reader in readers])
        step = (origins[-1] - origins[0]) / (count - 1)
        gaps = np.linalg.norm(np.diff(origins, axis=0), axis=1)
        if np.ptp(gaps) > 0.02 * np.median(gaps) + 0.01:
            raise ValueError(
                f"{path}: slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart;"
                " one is missing or doubled"
            )
        affine[:3, 2] = step
    dtype = _simpleitk().GetPixelIDValueAsString(first.GetPixelID())
    channels = first.GetNumberOfComponents()
    header = ScanHeader(path, "dicom", (rows, columns, depth * count), channels, dtype, affine)
    size = sum(Path(name).stat().st_size for name in files)
    return check_header(header, claimed=math.prod(header.shape), available=size * MAX_DEFLATE_RATIO)


def dicom_voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    """(I, J, K) voxels of a series after its rescale slope; for CT that is HU."""
    sitk = _simpleitk()
    files = _series_files(path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    try:
        image = reader.Execute() if len(files) > 1 else sitk.ReadImage(files[0])
    except RuntimeError as error:
        raise ValueError(f"{path}: SimpleITK cannot read the DICOM series") from error
    i, j, k = header.shape
    stored = sitk.GetArrayViewFromImage(image).reshape(k, j, i, -1)
    return _native(path, stored[..., channel])
