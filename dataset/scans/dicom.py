"""DICOM series, read through SimpleITK; nothing but geometry and voxels is taken from them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dataset.scans.header import MAX_DEFLATE_RATIO, ScanHeader, as_volume, check_header
from dataset.scans.itk import itk_affine, native, open_header


def _series_files(path: Path) -> tuple[str, ...]:
    """Files of the only DICOM series in a folder, ordered by position."""
    series_reader = sitk.ImageSeriesReader
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
    readers = [open_header(Path(name)) for name in files]
    first, count = readers[0], len(files)
    (rows, columns, depth), channels = as_volume(path, (*first.GetSize(), 1)[:3])
    if len({reader.GetSize() for reader in readers}) > 1:
        raise ValueError(f"{path}: images of different sizes in one DICOM series")
    affine = itk_affine(first)
    if count > 1:
        origins = np.array([itk_affine(reader)[:3, 3] for reader in readers])
        step = (origins[-1] - origins[0]) / (count - 1)
        gaps = np.linalg.norm(np.diff(origins, axis=0), axis=1)
        if np.ptp(gaps) > 0.02 * np.median(gaps) + 0.01:
            raise ValueError(
                f"{path}: slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart;"
                " one is missing or doubled"
            )
        affine[:3, 2] = step
    dtype = sitk.GetPixelIDValueAsString(first.GetPixelID())
    channels = first.GetNumberOfComponents()
    header = ScanHeader(path, "dicom", (rows, columns, depth * count), channels, dtype, affine)
    size = sum(Path(name).stat().st_size for name in files)
    return check_header(header, claimed=math.prod(header.shape), available=size * MAX_DEFLATE_RATIO)


def dicom_voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    """(I, J, K) voxels of a series after its rescale slope; for CT that is HU."""
    files = _series_files(path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    try:
        image = reader.Execute() if len(files) > 1 else sitk.ReadImage(files[0])
    except RuntimeError as error:
        raise ValueError(f"{path}: SimpleITK cannot read the DICOM series") from error
    i, j, k = header.shape
    stored = sitk.GetArrayViewFromImage(image).reshape(k, j, i, -1)
    return native(path, stored[..., channel])
