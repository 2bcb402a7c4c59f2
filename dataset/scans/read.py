"""Read a scan, its header alone, or a label map, whatever the file format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset.labels import check_label_ids, listed
from dataset.scans.find import ITK_SUFFIXES, NIFTI_SUFFIXES, SCAN_SUFFIXES
from dataset.scans.header import Scan, ScanHeader, size_text
from dataset.scans.nifti import NiftiFile, open_nifti
from dataset.scans.npz import CareSlice, open_npz
from dataset.text import counted

if TYPE_CHECKING:
    from dataset.scans.itk import ItkFile
    from dataset.scans.series import DicomSeries

    ScanFile = NiftiFile | DicomSeries | ItkFile | CareSlice

WHOLE_WITHIN = 1e-3  # a label this close to a whole number is that number


def open_scan(path: str | Path, series: int | None = None) -> ScanFile:
    """A scan with its header read: NIfTI, NRRD, MetaImage, CARE npz, or a folder with DICOM files.

    series: the number of a DICOM series in a folder that holds several. The result has `header`
    and `voxels(channel)`. Raises FileNotFoundError for a missing path and ValueError, with at most
    two lines, for an unknown format, a 2D image, several series and none chosen, slices that make
    no volume, an absurd size (over 2^30 voxels, or more than the file could hold), or an affine
    that is not finite or not invertible.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such scan")
    if series is not None and not path.is_dir():
        raise ValueError(f"{path}: --series chooses among DICOM series in a folder; leave it out")
    name = path.name.lower()
    if path.is_dir():
        from dataset.scans.series import open_series  # SimpleITK and pydicom take long to import

        return open_series(path, series)
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if name.endswith(NIFTI_SUFFIXES):
        return open_nifti(path)
    if name.endswith(ITK_SUFFIXES):
        from dataset.scans.itk import open_itk

        return open_itk(path)
    if name.endswith(".npz"):
        return open_npz(path)
    raise ValueError(
        f"{path}: not a scan; expected {', '.join(SCAN_SUFFIXES)} or a folder of DICOM files"
    )


def read_header(path: str | Path, series: int | None = None) -> ScanHeader:
    """Header of a scan; arguments and errors as for open_scan."""
    return open_scan(path, series).header


def read_scan(path: str | Path, channel: int | None = None, series: int | None = None) -> Scan:
    """A scan in file order: array (I, J, K), uint8, int16 or float32, in HU for CT.

    channel picks one volume of a file that holds several. An npz slice comes as (X, Y, 1) with
    affine None. Raises what open_scan raises, and ValueError for a missing or wrong channel,
    truncated or corrupt data and voxels that are not finite.
    """
    opened = open_scan(path, series)
    header = opened.header
    if channel is None and header.channels > 1:
        raise ValueError(f"{path}: holds {header.channels} volumes; choose one with --channel"
                         f" (0 to {header.channels - 1})")  # fmt: skip
    channel = channel or 0
    if not 0 <= channel < header.channels:
        raise ValueError(f"{path}: no channel {channel}; channels are 0 to {header.channels - 1}")
    return _loaded(opened, channel)


def _loaded(opened: ScanFile, channel: int) -> Scan:
    """One volume of a scan whose header was read."""
    header = opened.header
    try:
        return Scan(opened.voxels(channel), header)
    except MemoryError as error:
        raise ValueError(
            f"{header.path}: not enough memory for {size_text(header.shape)} voxels"
        ) from error


def read_label(path: str | Path, num_classes: int | None = None) -> Scan:
    """A label map in file order, uint8 (I, J, K); ids as check_label_ids requires.

    Values within 0.001 of a whole number are that number. Raises what read_scan raises, and
    ValueError, naming the ids, for fractional or unknown labels.
    """
    opened = open_scan(path)
    if opened.header.channels > 1:
        raise ValueError(
            f"{path}: a label map of {counted(opened.header.channels, 'volume')}; expected one"
            " volume with a class id in every voxel"
        )
    scan = _loaded(opened, 0)
    stored = scan.array
    if stored.dtype.kind == "f":
        whole = np.rint(stored)
        apart = np.abs(stored - whole) > WHOLE_WITHIN
        if apart.any():
            odd = np.unique(stored[apart])[:5]
            raise ValueError(f"{path}: labels are not whole numbers: {listed(odd)}")
        stored = whole
    check_label_ids(stored, num_classes, path)
    return Scan(stored.astype(np.uint8, order="K", copy=False), scan.header)
