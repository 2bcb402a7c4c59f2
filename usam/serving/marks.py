"""User input for one object: points, boxes, scribbles and lassos as clicks on voxels.

Voxels are (i, j, k), indices along the axes of the scan as stored, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from usam.prediction.windows import Voxel

MAX_SCRIBBLE_CLICKS = 5
MAX_LASSO_CLICKS = 3
Part = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Mark:
    """One action of the user; `undo` reverts it as a whole.

    clicks: (voxel, label), label 1 in the object and 0 outside. box: first and last voxel of a box
    around the object.
    """

    clicks: tuple[tuple[Voxel, int], ...] = ()
    box: tuple[Voxel, Voxel] | None = None

    @property
    def has_inside(self) -> bool:
        """Whether the mark shows where the object is."""
        return self.box is not None or any(label for _, label in self.clicks)


def point_mark(voxel: Voxel, *, inside: bool) -> Mark:
    """A single click on a voxel."""
    return Mark(((_voxel(voxel), int(inside)),))


def box_mark(low: Voxel, high: Voxel, *, inside: bool) -> Mark:
    """A box from its first to its last voxel; a box outside the object is a click in its centre."""
    low, high = _voxel(low), _voxel(high)
    if inside:
        return Mark(box=(low, high))
    return point_mark(box_centre((low, high)), inside=False)


def box_centre(box: tuple[Voxel, Voxel]) -> Voxel:
    """The middle voxel of a box."""
    return tuple((low + high) // 2 for low, high in zip(*box, strict=True))


def scribble_mark(painted: np.ndarray, first: Voxel, *, inside: bool) -> Mark:
    """Up to 5 clicks far from each other on a scribble; the first is the one nearest its middle.

    painted (I, J, K) bool, a part of the scan that begins at voxel `first`. Raises ValueError for
    an empty one.
    """
    voxels = np.argwhere(painted)
    if not len(voxels):
        raise ValueError("the scribble is empty; paint at least one voxel")
    return _clicks(spread(voxels, MAX_SCRIBBLE_CLICKS), first, inside=inside)


def lasso_mark(painted: np.ndarray, first: Voxel, *, inside: bool) -> Mark:
    """Up to 3 clicks well inside a lasso, the deepest first; an outline alone is filled.

    painted (I, J, K) bool, as of `scribble_mark`; filled slice by slice along its thinnest axis.
    """
    if not painted.any():
        raise ValueError("the lasso is empty; draw around at least one voxel")
    axis = int(np.argmin(painted.shape))
    planes = np.moveaxis(painted, axis, 0)
    filled = np.moveaxis(np.stack([ndimage.binary_fill_holes(plane) for plane in planes]), 0, axis)
    return _clicks(deep_voxels(filled, MAX_LASSO_CLICKS), first, inside=inside)


def deep_voxels(mask: np.ndarray, number: int) -> np.ndarray:
    """Up to `number` voxels (P, 3) of a mask (I, J, K), the deepest first, then far from it.

    Depth counts along axes of more than one voxel, so that a flat mask has a middle as well.
    """
    rim = [(1, 1) if size > 1 else (0, 0) for size in mask.shape]
    kept = tuple(slice(low, low + size) for (low, _), size in zip(rim, mask.shape, strict=True))
    flat = np.squeeze(np.pad(mask, rim))
    depth = ndimage.distance_transform_edt(flat if flat.ndim else flat[None])
    depth = depth.reshape(np.pad(mask, rim).shape)[kept]
    deepest = np.unravel_index(int(depth.argmax()), depth.shape)
    voxels = np.argwhere(depth > depth.max() / 2)
    return spread(voxels, number, start=np.array(deepest))


def spread(voxels: np.ndarray, number: int, start: np.ndarray | None = None) -> np.ndarray:
    """Up to `number` of the voxels (P, 3), each next one farthest from those before.

    start: the first; without one it is the voxel nearest to the middle of all.
    """
    middle = voxels.mean(axis=0) if start is None else start
    chosen = [int(((voxels - middle) ** 2).sum(axis=1).argmin())]
    apart = ((voxels - voxels[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < number and apart.max() > 0:
        chosen.append(int(apart.argmax()))
        apart = np.minimum(apart, ((voxels - voxels[chosen[-1]]) ** 2).sum(axis=1))
    return voxels[chosen]


def _clicks(voxels: np.ndarray, first: Voxel, *, inside: bool) -> Mark:
    placed = (voxels + np.array(first)).tolist()
    return Mark(tuple((_voxel(voxel), int(inside)) for voxel in placed))


def _voxel(values: Voxel) -> Voxel:
    return tuple(int(value) for value in values)
