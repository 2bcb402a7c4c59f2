"""Label maps and probabilities as NIfTI files that lie exactly where their scan lies.

Both systems write through here. A file on disk is always whole: it is written beside its name and
then renamed.
"""

from __future__ import annotations

import gzip
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from dataset.files import atomic_write
from dataset.scans.find import NIFTI_SUFFIXES
from dataset.scans.header import SHEAR_LIMIT, ScanHeader, shear_mm, without_shear
from dataset.scans.nifti import SPACE_UNITS, stored_header

STEPS = 65535  # of a probability, which is stored as uint16
PLACE_FIELDS = (  # of a NIfTI header: everything that places a voxel
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
MILLIMETRE = 2
MAX_NIFTI1_SIDE = 32767


def nifti_header(scan: ScanHeader) -> nib.Nifti1Header:
    """A NIfTI header with the scan's geometry and without any text.

    A NIfTI scan's own fields are copied as stored, codes and unit of length included, so that
    every reader that finds the scan at some place finds the copy there. Of other formats the
    affine becomes both sform and qform. Where slices are sheared (gantry tilt) there is no qform
    that fits: sform alone is written, which nibabel reads and ITK refuses to open.
    """
    if scan.nifti is not None:
        return _copied(stored_header(scan.nifti))
    is_long = max(scan.shape) > MAX_NIFTI1_SIDE
    header = nib.Nifti2Header() if is_long else nib.Nifti1Header()
    affine = np.eye(4) if scan.affine is None else scan.affine
    header.set_qform(without_shear(affine), code="scanner")  # sets the voxel sizes as well
    header.set_sform(affine, code="scanner")
    if shear_mm(affine, scan.shape) > SHEAR_LIMIT:
        header["qform_code"] = 0
    header["xyzt_units"] = MILLIMETRE if scan.spacing else 0
    return header


def _copied(stored: nib.Nifti1Header) -> nib.Nifti1Header:
    """A new header of the same version with the stored one's geometry and nothing else of it."""
    header = type(stored)()
    for field in PLACE_FIELDS:
        header[field] = stored[field]
    header["pixdim"][:4] = stored["pixdim"][:4]
    header["xyzt_units"] = int(stored["xyzt_units"]) & SPACE_UNITS
    return header


def _complete(
    header: nib.Nifti1Header, dtype: type, shape: tuple[int, ...], slope: float = 1.0
) -> bytes:
    """Header bytes of one file without extensions, up to where its voxels begin."""
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["scl_slope"], header["scl_inter"] = slope, 0
    header["vox_offset"] = header.single_vox_offset
    return header.binaryblock + bytes(4)  # no extension follows


def write_label_map(path: str | Path, label: np.ndarray, scan: ScanHeader) -> None:
    """Write a label map (I, J, K) uint8, in the scan's own axes, as a NIfTI in its geometry.

    path ends in .nii.gz or .nii. The file appears whole or not at all.
    """
    path = Path(path)
    assert path.name.endswith(NIFTI_SUFFIXES), path
    assert label.dtype == np.uint8, label.dtype
    assert label.shape == scan.shape, (label.shape, scan.shape)
    head = _complete(nifti_header(scan), np.uint8, label.shape)
    with atomic_write(path) as scratch, scratch.open("wb") as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
                _write_planes(packed, head, label)
        else:
            _write_planes(file, head, label)


def _write_planes(file: BinaryIO, head: bytes, label: np.ndarray) -> None:
    """The header and a volume plane by plane, so that no second copy of it is held."""
    file.write(head)
    for plane in label.transpose(2, 0, 1):
        file.write(plane.tobytes(order="F"))


class ProbabilityArray:
    """Probabilities in memory: `steps` (I, J, K, classes) uint16 in steps of 1/65535.

    It is filled as a ProbabilityFile is; `save` writes the same file.
    """

    def __init__(self, num_classes: int, scan: ScanHeader) -> None:
        self.scan, self.shape = scan, (*scan.shape, num_classes)
        self.steps = np.zeros(self.shape, dtype=np.uint16, order="F")

    def __enter__(self) -> ProbabilityArray:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def write(
        self,
        numbers: Sequence[int],
        steps: np.ndarray,
        canonical: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Slices `numbers` as uint16 (n, C, H, W); canonical: (I, J, K) -> (S, H, W), a view."""
        for class_id in range(self.shape[3]):
            canonical(self.steps[..., class_id])[list(numbers)] = steps[:, class_id]

    def save(self, path: Path) -> None:
        """Write the 4D NIfTI."""
        with ProbabilityFile(path, self.shape[3], self.scan) as file:
            for k in range(self.shape[2]):
                plane = self.steps[:, :, k].transpose(2, 0, 1)[None]  # (1, classes, I, J)
                file.write([k], plane, lambda volume: volume.transpose(2, 0, 1))


class ProbabilityFile:
    """A 4D NIfTI (I, J, K, classes) on the disk, written some slices at a time, then named `path`.

    Stored as uint16 in steps of 1/65535 with the scale in the header, so that viewers show 0 to 1,
    and not compressed, so that none of it is kept in memory. Use as a context.
    """

    def __init__(self, path: Path, num_classes: int, scan: ScanHeader) -> None:
        self.path, self._unfinished = path, ExitStack()
        self.shape = (*scan.shape, num_classes)
        header = nifti_header(scan)
        header["pixdim"][4] = 1
        self.head = _complete(header, np.uint16, self.shape, 1 / STEPS)
        wanted, free = 2 * math.prod(self.shape), shutil.disk_usage(path.parent).free
        if wanted > free:
            raise OSError(
                f"{path}: probabilities take {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )

    def __enter__(self) -> ProbabilityFile:
        self.scratch = self._unfinished.enter_context(atomic_write(self.path))
        with self.scratch.open("wb") as file:
            file.write(self.head)
            file.truncate(len(self.head) + 2 * math.prod(self.shape))
        return self

    def write(
        self,
        numbers: Sequence[int],
        steps: np.ndarray,
        canonical: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Slices `numbers` as uint16 (n, C, H, W); canonical: (I, J, K) -> (S, H, W), a view."""
        # Mapped again each time: the pages written then leave this process's memory.
        stored = np.memmap(
            self.scratch, np.uint16, mode="r+", offset=len(self.head), shape=self.shape, order="F"
        )
        for class_id in range(self.shape[3]):
            canonical(stored[..., class_id])[list(numbers)] = steps[:, class_id]

    def __exit__(self, *error: Any) -> None:
        self._unfinished.__exit__(*error)
