"""Cubes cut out of a volume, how they are placed and how their values are scaled.

The one copy of SAM-Med3D's crop: training, evaluation and prediction all take theirs from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Slices = tuple[slice, slice, slice]


def normalise(crops: Tensor) -> Tensor:
    """Crops with zero mean and unit variance over their own voxels > 0; float32.

    crops (N, 1, S, S, S) of any dtype, padding and air included: these are scaled along but not
    counted. The variance is unbiased. A crop without two different voxels > 0 is only shifted.
    Runs on the crops' device without a host sync. Source: published SAM-Med3D, per crop there in
    inference and over the batch in training; here per crop in both.
    """
    crops = crops.float()
    axes = tuple(range(1, crops.ndim))
    counted = crops > 0
    number = counted.sum(axes, keepdim=True)
    zero = crops.new_zeros(())
    mean = torch.where(counted, crops, zero).sum(axes, keepdim=True) / number.clamp(min=1)
    square = torch.where(counted, crops - mean, zero).square().sum(axes, keepdim=True)
    std = (square / (number - 1).clamp(min=1)).sqrt()
    return (crops - mean) / torch.where(std > 0, std, std.new_ones(()))


def box_origin(low: ArrayLike, high: ArrayLike, side: int) -> np.ndarray:
    """Voxel (3,) where a cube around a box begins; negative where it reaches out of the volume.

    low (3,) first voxel of the box, high (3,) one past its last. Source: published inference.
    """
    return (np.asarray(low) + np.asarray(high)) // 2 - side // 2


def click_origin(clicks: ArrayLike, side: int) -> np.ndarray:
    """Voxel (3,) where a cube around clicks (P, 3) begins.

    The cube is centred on the clicks' box; where that does not fit, on the first click. Raises
    ValueError without a click.
    """
    clicks = np.asarray(clicks, dtype=np.int64).reshape(-1, 3)
    if not len(clicks):
        raise ValueError("a patch needs at least one click; pass --point X Y Z")
    low, high = clicks.min(axis=0), clicks.max(axis=0) + 1
    if (high - low > side).any():
        low, high = clicks[0], clicks[0] + 1
    return box_origin(low, high, side)


def overlap(origin: ArrayLike, side: int, shape: Sequence[int]) -> tuple[Slices, Slices]:
    """The overlap of a cube and a volume of `shape`: slices of the volume, slices of the cube.

    Both are empty along an axis on which they do not meet.
    """
    inside, own = [], []
    for first, size in zip(np.asarray(origin).tolist(), shape, strict=True):
        low = min(max(first, 0), size)
        high = max(min(first + side, size), low)
        inside.append(slice(low, high))
        own.append(slice(low - first, high - first) if high > low else slice(0, 0))
    return tuple(inside), tuple(own)


def crop_at(volume: np.ndarray, origin: ArrayLike, side: int) -> np.ndarray:
    """The cube (S, S, S) of a volume (X, Y, Z) that begins at `origin`, zero outside; a copy.

    Only the voxels inside are read, so the volume may be a memory map.
    """
    crop = np.zeros((side, side, side), dtype=volume.dtype)
    inside, own = overlap(origin, side, volume.shape)
    crop[own] = volume[inside]
    return crop


def crop_reader(volume: np.ndarray) -> Callable[[ArrayLike, int], Tensor]:
    """A function (origin, side) -> normalised crop (1, 1, S, S, S) float32 of the volume."""

    def read(origin: ArrayLike, side: int) -> Tensor:
        return normalise(torch.from_numpy(crop_at(volume, origin, side))[None, None])

    return read
