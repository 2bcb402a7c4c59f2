"""Read a scan, its header alone, or a label map, whatever the file format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset.scans.header import Scan, ScanHeader, size_text
from dataset.scans.nifti import NIFTI_SUFFIXES, nifti_header, nifti_voxels
from dataset.scans.npz import npz_header, npz_voxels

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".npz")


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
        from dataset.scans.dicom import dicom_header  # SimpleITK takes long to import

        return dicom_header(path)
    if name.endswith(NIFTI_SUFFIXES):
        return nifti_header(path)[0]
    if name.endswith(ITK_SUFFIXES):
        from dataset.scans.itk import itk_header

        return itk_header(path)
    if name.endswith(".npz"):
        return npz_header(path)
    raise ValueError(
        f"{path}: not a scan; expected {', '.join(SCAN_SUFFIXES)} or a DICOM series folder"
    )


def read_scan(path: str | Path, channel: int | None = None) -> Scan:
    """A scan in file order: NIfTI, a DICOM series folder, NRRD, MetaImage or a CARE npz.

    array (I, J, K) is uint8, int16 or float32, in HU for CT; an npz slice comes as (X, Y, 1) with
    affine None. channel picks one volume of a file that holds several. Raises what read_header
    raises, and ValueError for a missing or wrong channel, truncated or corrupt data and voxels
    that are not finite.
    """
    path = Path(path)
    header = read_header(path)
    if channel is None and header.channels > 1:
        raise ValueError(f"{path}: holds {header.channels} channels; choose one with --channel")
    channel = channel or 0
    if not 0 <= channel < header.channels:
        raise ValueError(f"{path}: no channel {channel}; it has {header.channels}, from 0")
    try:
        array = _voxels(path, header, channel)
    except MemoryError as error:
        raise ValueError(
            f"{path}: not enough memory for {size_text(header.shape)} voxels"
        ) from error
    return Scan(array, header)


def _voxels(path: Path, header: ScanHeader, channel: int) -> np.ndarray:
    if header.format == "dicom":
        from dataset.scans.dicom import dicom_voxels

        return dicom_voxels(path, header, channel)
    if header.format == "nrrd":
        from dataset.scans.itk import itk_voxels

        return itk_voxels(path, header, channel)
    if header.format == "npz":
        return npz_voxels(path, header, channel)
    return nifti_voxels(path, header, channel)


def read_label(path: str | Path, num_classes: int = 256) -> Scan:
    """A label map in file order, uint8 (I, J, K) in [0, num_classes).

    Raises what read_scan raises, and ValueError, naming the ids, for fractional or unknown labels.
    """
    scan = read_scan(path)
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
