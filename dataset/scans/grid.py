"""The 1.5 mm grid in RAS order that SAM-Med3D sees a scan on, and resampling to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import nibabel as nib
import numpy as np

from dataset.scans.header import ScanHeader, size_text
from dataset.scans.orientation import lps_affine, turn_to_lps

SPACING = 1.5  # mm
MAX_RESAMPLED = 2**30  # voxels
GRACE = 1e-3  # of a voxel: float32 affines give sizes like 120.00001, which mean 120


@dataclass(frozen=True)
class Grid:
    """Where a scan's voxels lie and where those of its 1.5 mm volume do.

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
            f"{header.path}: a single slice of {size_text(header.shape)}; SAM-Med3D wants a volume"
        )
    grid = Grid(header)
    if math.prod(grid.shape) > MAX_RESAMPLED:
        raise ValueError(
            f"{header.path}: {size_text(grid.shape)} voxels at {SPACING} mm; at most 2^30 are made"
        )
    return grid


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
    """For each voxel of an axis: its two neighbours, the second's weight, and if it is inside."""
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
    """Float32 values a share `weight` of the way from first to second; exact where both agree."""
    first = first.astype(np.float32)
    return first + weight * (second.astype(np.float32) - first)
