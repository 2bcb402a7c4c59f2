"""Resamples scans to SAM-Med3D's 1.5 mm grid in RAS order, and labels back to the scan's voxels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from dataset.scans.header import Scan, ScanHeader, size_text
from dataset.scans.orientation import (
    geometry_difference,
    lps_affine,
    turn_from_lps,
    turn_to_lps,
)
from dataset.scans.read import read_label, read_scan
from dataset.scans.write import write_label_map

SPACING = 1.5  # mm
MAX_RESAMPLED = 2**30  # voxels
GRACE = 1e-3  # of a voxel: float32 affines give sizes like 120.00001, which mean 120


@dataclass(frozen=True)
class Grid:
    """The geometry of a scan and of its 1.5 mm volume.

    The scan is turned to LPS by its nearest axes, resampled from the outer corner of its first
    voxel, and flipped to RAS. Published inference resamples in the file's own axes instead, so
    that its volume depends on how a scan happens to be stored; for LPS files, the usual ones, the
    two agree.
    """

    header: ScanHeader

    @property
    def turn(self) -> np.ndarray:
        """nibabel orientation transform, file axes -> LPS."""
        return turn_to_lps(self.header.affine)

    @cached_property
    def upright(self) -> tuple[int, int, int]:
        """Sizes of the scan turned to LPS, (x, y, z)."""
        axes = np.argsort(self.turn[:, 0])
        return tuple(int(self.header.shape[axis]) for axis in axes)

    @cached_property
    def step(self) -> np.ndarray:
        """Scan voxels (3,) from one 1.5 mm voxel to the next, (x, y, z)."""
        step = SPACING / np.linalg.norm(self._upright_affine[:3, :3], axis=0)
        return np.where(np.abs(step - 1) < 1e-5, 1.0, step)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Sizes (X, Y, Z) of the 1.5 mm volume: whole voxels that hold all of the scan."""
        return tuple(
            max(1, math.ceil(size / step - GRACE))
            for size, step in zip(self.upright, self.step, strict=True)
        )

    @cached_property
    def affine(self) -> np.ndarray:
        """(4, 4) from the volume's index to RAS mm."""
        x, y, _ = self.shape
        flip = nib.affines.from_matvec(np.diag([-1.0, -1.0, 1.0]), (x - 1, y - 1, 0))
        scale = nib.affines.from_matvec(np.diag(self.step), (self.step - 1) / 2)
        return self._upright_affine @ scale @ flip

    @cached_property
    def _upright_affine(self) -> np.ndarray:
        return lps_affine(self.header.affine, self.header.shape)

    def positions(self, axis: int) -> np.ndarray:
        """Scan index (LPS, fractional) of each of the volume's voxels, in LPS order."""
        step = self.step[axis]
        return 0.5 * (step - 1) + np.arange(self.shape[axis]) * step

    def nearest(self, axis: int, position: np.ndarray | None = None) -> np.ndarray:
        """Volume index (LPS) of each of the scan's voxels, or of scan positions, on an axis."""
        if position is None:
            position = np.arange(self.upright[axis])
        index = (position - 0.5 * (self.step[axis] - 1)) / self.step[axis]
        return np.clip(np.floor(index + 0.5).astype(np.int64), 0, self.shape[axis] - 1)

    def nearest_of(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (P, 3) of the volume that hold the scan's positions (P, 3), file order."""
        back = nib.orientations.inv_ornt_aff(self.turn, self.header.shape)
        upright = nib.affines.apply_affine(np.linalg.inv(back), voxels)
        found = np.stack([self.nearest(axis, upright[:, axis]) for axis in range(3)], axis=1)
        found[:, :2] = np.array(self.shape[:2]) - 1 - found[:, :2]  # LPS -> RAS
        return found


def grid_of(header: ScanHeader) -> Grid:
    """The grid of a scan; raises ValueError for a single slice or an absurd size."""
    if header.affine is None or min(header.shape) < 2:
        raise ValueError(
            f"{header.path}: a single slice of {size_text(header.shape)}; SAM-Med3D needs a volume"
        )
    if header.spacing is None:
        raise ValueError(f"{header.path}: states no voxel size, which SAM-Med3D needs")
    grid = Grid(header)
    if math.prod(grid.shape) > MAX_RESAMPLED:
        raise ValueError(
            f"{header.path}: {size_text(grid.shape)} voxels at {SPACING} mm; at most 2^30 are made"
        )
    return grid


@dataclass(frozen=True)
class ScanVolume:
    """A scan at 1.5 mm, image (X, Y, Z) in RAS order, and its relation to the scan's own grid.

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
        """Write a label at the image's voxels (X, Y, Z) uint8 as a NIfTI in the scan's geometry."""
        write_label_map(path, self.restore(label), self.grid.header)


def read_volume(
    path: str | Path, channel: int | None = None, series: int | None = None
) -> ScanVolume:
    """A scan at 1.5 mm in RAS order: NIfTI, a DICOM series folder or NRRD.

    Raises FileNotFoundError, or ValueError with one line: a 2D image or single slice, several
    channels and none chosen, a file that cannot be read.
    """
    return volume_of(read_scan(path, channel, series))


def volume_of(scan: Scan) -> ScanVolume:
    """A scan as read, at 1.5 mm in RAS order; ValueError for a single slice."""
    grid = grid_of(scan.header)
    return ScanVolume(resample_image(scan.array, grid), grid)


def read_label_volume(path: str | Path, grid: Grid, num_classes: int | None = None) -> np.ndarray:
    """A label file, uint8 (X, Y, Z), at the voxels of an image's 1.5 mm volume.

    Raises what read_label raises, and ValueError if it does not lie on the image.
    """
    label = read_label(path, num_classes)
    difference = geometry_difference(grid.header, label.header)
    if difference:
        raise ValueError(f"{path}: does not lie on {grid.header.path.name}: {difference}")
    # The label's own axes may differ from the image's, its place does not.
    return resample_label(label.array, Grid(label.header))


def resample_image(array: np.ndarray, grid: Grid) -> np.ndarray:
    """Image (I, J, K) in file order -> (X, Y, Z) at 1.5 mm, int16 or float32; trilinear.

    Edges are clamped; a voxel whose centre lies outside the scan is 0, as published (not air).
    Integers are interpolated in float32 and truncated towards zero, also as published.
    """
    planes = _turned(array, grid).transpose(2, 1, 0)  # (z, y, x): NIfTI's order in memory
    dtype = np.float32 if array.dtype.kind == "f" else np.int16
    out = np.zeros(grid.shape[::-1], dtype=dtype)
    rows, columns = _weights(grid, 1), _weights(grid, 0)
    depth = _weights(grid, 2)
    for k, (low, high, weight, inside) in enumerate(zip(*depth, strict=True)):
        if inside:
            plane = _between(planes[low], planes[high], weight)
            out[k] = _along(_along(plane, rows, 0), columns, 1)
    return np.ascontiguousarray(out.transpose(2, 1, 0)[::-1, ::-1])


def resample_label(array: np.ndarray, grid: Grid) -> np.ndarray:
    """Label (I, J, K) in file order -> (X, Y, Z) at 1.5 mm, the nearest voxel, 0 outside."""
    out = _turned(array, grid)
    for axis in range(3):
        index = np.floor(grid.positions(axis) + 0.5).astype(int)
        out = np.take(out, np.minimum(index, grid.upright[axis] - 1), axis=axis)
        np.moveaxis(out, axis, 0)[index >= grid.upright[axis]] = 0
    return np.ascontiguousarray(out[::-1, ::-1])


def _turned(array: np.ndarray, grid: Grid) -> np.ndarray:
    """The array in LPS axes; a view."""
    if array.shape != grid.header.shape:
        raise ValueError(f"{grid.header.path}: {array.shape} voxels are not {grid.header.shape}")
    return nib.apply_orientation(array, grid.turn)


def _weights(grid: Grid, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each voxel of an axis: its two neighbours, the second's weight, whether it is inside."""
    last, position = grid.upright[axis] - 1, grid.positions(axis)
    low = np.floor(position)
    weight = (position - low).astype(np.float32)
    neighbours = (np.clip(low + step, 0, last).astype(int) for step in (0, 1))
    return (*neighbours, weight, position < last + 0.5)


def _along(plane: np.ndarray, weights: tuple[np.ndarray, ...], axis: int) -> np.ndarray:
    low, high, weight, inside = (np.expand_dims(part, 1 - axis) for part in weights)
    first, second = (np.take(plane, index.ravel(), axis=axis) for index in (low, high))
    return _between(first, second, weight) * inside


def _between(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Linear interpolation, float32, from first to second by `weight`; exact where both agree."""
    first = first.astype(np.float32)
    return first + weight * (second.astype(np.float32) - first)
