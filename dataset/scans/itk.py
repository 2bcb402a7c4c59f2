"""NRRD and MetaImage files, read through SimpleITK; nothing but geometry and voxels is taken."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    ScanHeader,
    as_volume,
    check_header,
    narrow,
)

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

sitk.ProcessObject.SetGlobalWarningDisplay(False)


def open_header(path: Path) -> sitk.ImageFileReader:
    """SimpleITK reader of one file with its header read; errors never quote DICOM tags."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path}: SimpleITK cannot read its header") from error
    return reader


def itk_affine(reader: sitk.ImageFileReader) -> np.ndarray:
    """(4, 4) index -> RAS mm from an ITK header, which is in LPS."""
    dims = reader.GetDimension()
    direction = np.array(reader.GetDirection(), dtype=np.float64).reshape(dims, dims)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    return RAS_FROM_LPS @ affine


def itk_header(path: Path) -> ScanHeader:
    """Header of an NRRD or MetaImage file; raises ValueError for what cannot be a volume."""
    reader = open_header(path)
    size = tuple(reader.GetSize())
    shape, channels = as_volume(path, size)
    channels *= reader.GetNumberOfComponents()
    dtype = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    affine = itk_affine(reader)
    header = ScanHeader(path, "nrrd", shape, channels, dtype, affine)
    attached = path.suffix.lower() != ".nhdr"
    claimed = math.prod(shape) * channels if attached else None  # at least a byte a voxel
    return check_header(header, claimed=claimed, available=path.stat().st_size * MAX_DEFLATE_RATIO)


def itk_voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    """(I, J, K) voxels of one channel of a file; vector components count before repeats."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: SimpleITK cannot read its voxels") from error
    i, j, k = header.shape
    components = image.GetNumberOfComponentsPerPixel()
    stored = sitk.GetArrayViewFromImage(image).reshape(-1, k, j, i, components)
    repeat, component = divmod(channel, components)
    return native(path, stored[repeat, ..., component])


def native(path: Path, stored: np.ndarray) -> np.ndarray:
    """ITK's (K, J, I) as (I, J, K), copied out of ITK's memory and narrowed."""
    if stored.dtype.kind in "iu" and stored.min() >= -32768 and stored.max() <= 32767:
        stored = stored.astype(np.uint8 if stored.dtype == np.uint8 else np.int16)
    return np.array(narrow(path, stored)).transpose(2, 1, 0)
