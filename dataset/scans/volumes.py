"""A scan as a 1.5 mm volume for SAM-Med3D, and labels of that volume on the scan's own voxels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from dataset.scans.grid import Grid, grid_of, resample_image, resample_label
from dataset.scans.orientation import geometry_difference, turn_from_lps
from dataset.scans.read import read_label, read_scan
from dataset.scans.write import write_label_map


@dataclass(frozen=True)
class ScanVolume:
    """A scan at 1.5 mm, image (X, Y, Z) in RAS order, and the way back to the scan's own grid.

    image is int16 (integer scans; interpolated values lose their fraction) or float32.
    """

    image: np.ndarray
    grid: Grid

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) from the image's index to RAS mm."""
        return self.grid.affine

    def clicks(self, points: ArrayLike, *, mm: bool = False) -> np.ndarray:
        """Voxels (P, 3) of the image that hold the points (P, 3); int64.

        points are voxel indices (i, j, k) of the scan as stored, or RAS millimetres with mm.
        Raises ValueError, naming the point, for one outside the scan.
        """
        header, points = self.grid.header, np.asarray(points, dtype=np.float64).reshape(-1, 3)
        to_voxels = np.linalg.inv(header.affine) if mm else np.eye(4)
        voxels = nib.affines.apply_affine(to_voxels, points)
        outside = ~((voxels >= -0.5) & (voxels < np.array(header.shape) - 0.5)).all(axis=1)
        if outside.any():
            unit, place = " mm" if mm else "", points[outside][0]
            listed = " ".join(f"{value:g}" for value in place)
            raise ValueError(
                f"click {listed}{unit} lies outside {header.path}, whose voxels are 0 0 0 to"
                f" {' '.join(str(size - 1) for size in header.shape)}{self._extent(mm)}"
            )
        return self.grid.nearest_of(voxels)

    def _extent(self, mm: bool) -> str:
        if not mm:
            return ""
        corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(self.grid.header.shape) - 1)
        placed = nib.affines.apply_affine(self.grid.header.affine, corners)
        low, high = placed.min(axis=0), placed.max(axis=0)
        return f", {' '.join(f'{v:g}' for v in low)} to {' '.join(f'{v:g}' for v in high)} mm"

    def restore(self, label: np.ndarray) -> np.ndarray:
        """A label at the image's voxels (X, Y, Z) on the scan's own (I, J, K), each its nearest."""
        grid = self.grid
        if label.shape != grid.shape:
            raise ValueError(f"label of {label.shape}: the volume is {grid.shape}")
        lps = label[::-1, ::-1][np.ix_(*(grid.nearest(axis) for axis in range(3)))]
        back = turn_from_lps(grid.header.affine)
        return np.ascontiguousarray(nib.apply_orientation(lps, back))

    def save(self, path: str | Path, label: np.ndarray) -> None:
        """Write a label at the image's voxels (X, Y, Z) uint8 as a NIfTI placed as the scan."""
        write_label_map(path, self.restore(label), self.grid.header)


def read_volume(path: str | Path, channel: int | None = None) -> ScanVolume:
    """A scan at 1.5 mm in RAS order: NIfTI, a DICOM series folder or NRRD.

    Raises FileNotFoundError, or ValueError with one line: a 2D image or single slice, several
    channels and none chosen, a file that cannot be read.
    """
    scan = read_scan(path, channel)
    grid = grid_of(scan.header)
    return ScanVolume(resample_image(scan.array, grid), grid)


def read_label_volume(path: str | Path, grid: Grid, num_classes: int = 256) -> np.ndarray:
    """A label file, uint8 (X, Y, Z), at the voxels of an image's 1.5 mm volume.

    Raises what read_label raises, and ValueError if it does not lie on the image.
    """
    label = read_label(path, num_classes)
    difference = geometry_difference(grid.header, label.header)
    if difference:
        raise ValueError(f"{path}: does not lie on {grid.header.path.name}: {difference}")
    # The label's own axes may differ from the image's, its place does not.
    return resample_label(label.array, Grid(label.header))
