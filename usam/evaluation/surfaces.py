"""How far the surfaces of two volumes lie apart: HD95 and the normalised surface Dice (NSD).

`usam.case_metrics` scores cases with `surface_distances`, `usam.evaluate3d` clicked objects with
`surface_dice`; distances are exact, in the unit of `spacing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

PERCENT = 95
SLAB = 1_000_000  # voxels whose surface is looked for at a time


class SurfaceDistances(NamedTuple):
    """Surface elements of two objects: distance to the other object's surface, and area.

    Four float64 arrays: predicted elements first, then true ones. A distance is infinite where
    the other object is empty.
    """

    predicted: np.ndarray
    true: np.ndarray
    predicted_areas: np.ndarray
    true_areas: np.ndarray

    def dice(self, tolerance: float) -> float:
        """Share of both surfaces, by area, that lies within `tolerance` of the other."""
        distances = np.concatenate([self.predicted, self.true])
        areas = np.concatenate([self.predicted_areas, self.true_areas])
        return float(areas[distances <= tolerance].sum() / areas.sum())

    def hausdorff95(self) -> float:
        """Distance that 95 % of either surface, by area, lies within of the other."""
        return max(
            _percentile(distances, areas)
            for distances, areas in zip(self[:2], self[2:], strict=True)
            if len(distances)
        )


def require_monai() -> None:
    """Raises ValueError, saying what to install, where `surface_distances` cannot work."""
    try:
        import monai.metrics  # noqa: F401
    except ImportError as error:
        raise ValueError(f"surface distances need MONAI ({error}): pip install monai") from None


def surface_distances(
    parts: Sequence[tuple[np.ndarray, np.ndarray, Sequence[float]]],
) -> SurfaceDistances:
    """The surfaces of one object in one or several volumes that have nothing to do in between.

    parts: (prediction, truth, spacing): bool arrays of one size and the size of a voxel along their
    axes; what is outside of an array is empty. Surface elements lie between voxels, their area is
    that of the surface through the eight voxels around. Volumes are cut to the objects.
    Source: Nikolov et al. 2018, as MONAI computes it (`use_subvoxels`).
    """
    found = [_distances(*part) for part in parts]
    return SurfaceDistances(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def _distances(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> SurfaceDistances:
    from monai.metrics import get_surface_distance  # takes seconds to import

    labelled = ndimage.find_objects((prediction | truth).view(np.uint8))
    box = labelled[0] if labelled else ()
    edges, areas = _surface_elements(prediction[box], truth[box], spacing)
    distances = [
        get_surface_distance(own, other, spacing=spacing)
        if own.any() and other.any()
        else np.full(np.count_nonzero(own), np.inf)
        for own, other in (edges, edges[::-1])
    ]
    return SurfaceDistances(*(values.astype(np.float64) for values in [*distances, *areas]))


def _surface_elements(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Where the elements of both surfaces lie, bool (S + 1, H + 1, W + 1), and their areas.

    Found slab by slab: MONAI holds some 300 bytes a voxel, and stray voxels make boxes large.
    """
    from monai.metrics import get_mask_edges

    padded = [torch.from_numpy(np.pad(mask, 1)) for mask in (prediction, truth)]
    depth, *plane = padded[0].shape
    thickness = max(1, SLAB // (plane[0] * plane[1]))
    edges: tuple[list[np.ndarray], ...] = ([], [])
    areas: tuple[list[np.ndarray], ...] = ([], [])
    for start in range(0, depth - 1, thickness):
        slab = [mask[start : start + thickness + 1] for mask in padded]
        found = get_mask_edges(*slab, crop=False, spacing=[float(side) for side in spacing])
        for k, (edge, area) in enumerate(zip(found[:2], found[2:], strict=True)):
            edges[k].append(np.asarray(edge))
            areas[k].append(np.asarray(area[edge]))
    return [np.concatenate(part) for part in edges], [np.concatenate(part) for part in areas]


def _percentile(distances: np.ndarray, areas: np.ndarray) -> float:
    """The smallest distance that PERCENT of the area does not exceed."""
    order = distances.argsort()
    reached = areas[order].cumsum() / areas.sum()
    index = np.searchsorted(reached, PERCENT / 100)
    return float(distances[order][min(index, len(order) - 1)])


def surface_dice(
    prediction: np.ndarray, truth: np.ndarray, *, spacing: Sequence[float], tolerance: float
) -> float:
    """Share of both surfaces that lies within `tolerance` mm of the other; 1 is perfect.

    prediction, truth (X, Y, Z) bool; spacing mm along each axis. A surface is the voxels of an
    object with a face that is not shared with another of its voxels; the volume's border is such a
    face. Two empty objects give 1, one empty object 0. Raises ValueError if the sizes differ.
    Source: Nikolov et al. 2018, with voxel centres for surface elements, as MONAI has it by
    default: voxels of 1.5 mm have the same size along every axis and need no areas.
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
