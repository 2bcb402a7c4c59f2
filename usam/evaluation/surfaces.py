"""Distances between the surfaces of two objects: HD95 and the normalised surface Dice (NSD).

Both systems are scored by these. Surface elements lie between voxels and count by their area;
distances are exact, in the unit of `spacing`. Source: Nikolov et al. 2018, as their own
implementation, surface-distance, computes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import surface_distance as library

PERCENT = 95
SIDES = (("distances_gt_to_pred", "surfel_areas_gt"), ("distances_pred_to_gt", "surfel_areas_pred"))

Part = tuple[np.ndarray, np.ndarray, Sequence[float]]
Surfaces = dict[str, np.ndarray]


def surface_distances(parts: Sequence[Part], *, flat: bool = False) -> Surfaces:
    """The surface elements of one object in one or several separate volumes.

    parts: (prediction, truth, spacing): bool arrays of one size and the size of a voxel along
    their axes; what is outside of an array is empty. flat: the volumes are single slices
    (1, H, W), whose surfaces are curves, with lengths for areas. Gives for both objects, under
    surface-distance's names, the distance of each element to the other object's surface, sorted,
    and its area. A distance is infinite in a part where the other object is empty.
    """
    found = [_distances(*_plane(part) if flat else part) for part in parts]
    joined: Surfaces = {}
    for distance, area in SIDES:
        distances = np.concatenate([one[distance] for one in found])
        order = distances.argsort(kind="stable")
        joined[distance] = distances[order]
        joined[area] = np.concatenate([one[area] for one in found])[order]
    return joined


def surface_dice(surfaces: Surfaces, tolerance: float) -> float:
    """Share of both surfaces, by area, that lies within `tolerance` of the other."""
    return float(library.compute_surface_dice_at_tolerance(surfaces, tolerance))


def object_nsd(
    found: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> float:
    """NSD at `tolerance` of masks (X, Y, Z), also of a single slice along any axis.

    spacing: the size of a voxel along the axes. 0 where nothing was found.
    """
    if not found.any():
        return 0.0
    flat = 1 in truth.shape
    if flat:  # `surface_distances` expects the single slice on the first axis
        axis = truth.shape.index(1)
        found, truth = np.moveaxis(found, axis, 0), np.moveaxis(truth, axis, 0)
        spacing = (spacing[axis], *spacing[:axis], *spacing[axis + 1 :])
    return surface_dice(surface_distances([(found, truth, spacing)], flat=flat), tolerance)


def hausdorff95(surfaces: Surfaces) -> float:
    """Distance within which 95 % of either surface, by area, lies from the other."""
    return float(library.compute_robust_hausdorff(surfaces, PERCENT))


def _plane(part: Part) -> Part:
    prediction, truth, spacing = part
    return prediction[0], truth[0], spacing[1:]


def _distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> Surfaces:
    """One part's surfaces; surface-distance itself fails on an empty object under NumPy 2."""
    if prediction.any() and truth.any():
        return library.compute_surface_distances(truth, prediction, spacing)
    found = {name: np.zeros(0) for side in SIDES for name in side}
    for mask, (distance, area) in zip((truth, prediction), SIDES, strict=True):
        if mask.any():
            found[area] = library.compute_surface_distances(mask, mask, spacing)[area]
            found[distance] = np.full(len(found[area]), np.inf)
    return found
