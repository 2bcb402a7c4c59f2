"""How far the surfaces of two volumes lie apart: the normalised surface Dice (NSD).

`usam.evaluate3d` scores objects with it; distances are exact, in mm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


def surface_dice(
    prediction: np.ndarray, truth: np.ndarray, *, spacing: Sequence[float], tolerance: float
) -> float:
    """Share of both surfaces that lies within `tolerance` mm of the other; 1 is perfect.

    prediction, truth (X, Y, Z) bool; spacing mm along each axis. A surface is the voxels of an
    object with a face that is not shared with another of its voxels; the volume's border is such a
    face. Two empty objects give 1, one empty object 0. Raises ValueError if the sizes differ.
    Source: Nikolov et al. 2018, with voxel centres for surface elements, as in MONAI.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"sizes differ: {prediction.shape} predicted, {truth.shape} true")
    if not prediction.any() or not truth.any():
        return float(prediction.any() == truth.any())
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    surfaces = [_surface(mask[box]) for mask in (prediction, truth)]
    near = total = 0
    for own, other in (surfaces, surfaces[::-1]):
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)
        near += np.count_nonzero(distance[own] <= tolerance)
        total += np.count_nonzero(own)
    return near / total


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)
