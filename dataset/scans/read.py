"""Read a scan, its header alone, or a label map, whatever the file format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from dataset.labels import check_label_ids, listed
from dataset.scans import nifti
from dataset.scans.find import ITK_SUFFIXES, NIFTI_SUFFIXES, SCAN_SUFFIXES
from dataset.scans.header import (
    Scan,
    ScanHeader,
    check_header,
    mm_text,
    narrow,
    size_text,
    whole_as_int16,
)
from dataset.scans.nifti import NiftiFile, open_nifti
from dataset.scans.npz import CareSlice, open_npz
from dataset.text import counted

if TYPE_CHECKING:
    from dataset.scans.itk import ItkFile
    from dataset.scans.series import DicomSeries

    ScanFile = NiftiFile | DicomSeries | ItkFile | CareSlice

IN_MEMORY = Path("scan")  # stands for the path of a scan that has none
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
    return _loaded(opened, opened.header.channel(channel))


def scan_of(
    source: Any,
    *,
    affine: ArrayLike | None = None,
    spacing: Sequence[float] | None = None,
    channel: int | None = None,
    series: int | None = None,
) -> Scan:
    """A scan from a path, a nibabel or SimpleITK image, or an array; see `scan_of_array`.

    What is in memory is called `scan`, a nibabel image by the name of its file. Raises what
    read_scan raises, and ValueError for anything else, and for affine and spacing of no array.
    """
    is_array = isinstance(source, np.ndarray)
    if not is_array and (affine is not None or spacing is not None):
        raise ValueError("affine and spacing are for an array; files and images have their own")
    if isinstance(source, str | Path):
        return read_scan(source, channel, series)
    if series is not None:
        raise ValueError("series chooses among DICOM series in a folder; leave it out")
    if is_array:
        if channel is not None:
            raise ValueError("channel is for files and images of several volumes; leave it out")
        return scan_of_array(source, affine, spacing)
    if isinstance(source, nib.spatialimages.SpatialImage):
        return nifti.scan_of_image(Path(source.get_filename() or IN_MEMORY), source, channel)
    if type(source).__module__.startswith("SimpleITK"):
        from dataset.scans.itk import scan_of_image

        return scan_of_image(IN_MEMORY, source, channel)
    raise ValueError(
        f"a scan is a path, an array or an image of nibabel or SimpleITK; found {type(source)}"
    )


def scan_of_array(
    array: np.ndarray, affine: ArrayLike | None = None, spacing: Sequence[float] | None = None
) -> Scan:
    """A scan from an array (I, J, K), in HU for CT; whole numbers become int16 where they fit.

    affine (4, 4): voxel index -> RAS mm. spacing (3,): mm along the array's axes, which without an
    affine are taken as LPS: to the left, the back and the head; without either the size of a voxel
    is unknown. Raises ValueError for other shapes and values, and for two that contradict.
    """
    if array.ndim != 3:
        raise ValueError(f"an array of {array.ndim} axes; expected 3, one volume")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of {array.dtype}; expected plain numbers")
    sizes = np.ones(3) if spacing is None else np.asarray(spacing, dtype=np.float64)
    if sizes.shape != (3,) or not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"spacing: expected three lengths in mm above 0, found {spacing!r:.80}")
    facts = {"oriented": affine is not None, "sized": affine is not None or spacing is not None}
    matrix = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
    if affine is not None:
        matrix = np.asarray(affine, dtype=np.float64)
        if matrix.shape != (4, 4):
            raise ValueError(f"affine: expected 4 x 4 numbers, found {size_text(matrix.shape)}")
    shape = tuple(int(size) for size in array.shape)
    header = ScanHeader(IN_MEMORY, "array", shape, 1, array.dtype.name, matrix, **facts)
    header = check_header(header, claimed=None, available=0)
    if spacing is not None and not np.allclose(header.spacing, sizes, rtol=1e-3):
        raise ValueError(f"spacing is {mm_text(sizes)}, that of affine {mm_text(header.spacing)}")
    return Scan(narrow(IN_MEMORY, whole_as_int16(array)), header)


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
