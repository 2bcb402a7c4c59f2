"""Slices of the CARE release: npz files with one 2D image each."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    ScanHeader,
    check_header,
    first_line,
    narrow,
    size_text,
)
from dataset.store.folder import HEADER_BYTES, npy_header

NUMPY_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class CareSlice:
    """A CARE slice whose header was read."""

    header: ScanHeader

    def voxels(self, channel: int) -> np.ndarray:
        """The image as (X, Y, 1), in the file's own dtype."""
        assert channel == 0
        path = self.header.path
        try:
            with np.load(path, allow_pickle=False) as archive:
                image = archive["image"]
        except (OSError, EOFError, ValueError, RuntimeError, *_ZIP_ERRORS) as error:
            raise ValueError(f"{path}: not a readable CARE slice ({first_line(error)})") from error
        narrow(path, image)  # finite; kept as it is, so that it is scaled as it was packed
        return image[:, :, None]


def open_npz(path: Path) -> CareSlice:
    """The member `image`, (X, Y), of a CARE slice, which is stored transposed, as (X, Y, 1)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("image.npy").compress_type not in NUMPY_COMPRESSIONS:
                raise ValueError("image is compressed in a way numpy never writes")
            with archive.open("image.npy") as stream:
                shape, _, dtype, _ = npy_header(stream.read(HEADER_BYTES))
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, *_ZIP_ERRORS) as error:
        raise ValueError(f"{path}: not a CARE slice ({first_line(error)})") from error
    if len(shape) != 2 or dtype.kind not in "iufb":
        raise ValueError(
            f"{path}: image is {size_text(shape):.80} {dtype!s:.40}; expected a 2D array of numbers"
        )
    header = ScanHeader(path, "npz", (*shape, 1), 1, dtype.name, None)
    claimed = math.prod(shape) * dtype.itemsize
    available = path.stat().st_size * MAX_DEFLATE_RATIO
    return CareSlice(check_header(header, claimed=claimed, available=available))
