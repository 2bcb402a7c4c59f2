"""Whether the slices of a series are evenly spaced on a line; if not, the reason why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.scans.dicom import DicomSlice
from dataset.text import counted

PLACE_TOLERANCE = (0.05, 0.01)  # mm, and share of the step between slices: the larger counts
TURN_TOLERANCE = 1e-3  # rad


def places(heights: np.ndarray) -> list[list[int]]:
    """Indices of slices grouped by their position along the stack, lowest first."""
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(heights[order])
    real = gaps[gaps > 1e-3]
    same = min(0.02, 0.1 * float(np.median(real))) if len(real) else math.inf
    groups = [[int(order[0])]]
    for number, gap in zip(order[1:], gaps, strict=True):
        if gap <= same:
            groups[-1].append(int(number))
        else:
            groups.append([int(number)])
    return groups


def even_step(folder: Path, slices: Sequence[DicomSlice], normal: np.ndarray) -> np.ndarray:
    """The step (3,) mm from slice to slice; ValueError if they are not evenly spaced on a line."""
    positions = np.array([one.position for one in slices])
    if len(positions) == 1:
        return normal
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    tolerance = max(PLACE_TOLERANCE[0], PLACE_TOLERANCE[1] * float(np.linalg.norm(step)))
    if _off_line(positions) > tolerance * (1 + 1e-6):
        raise ValueError(f"{folder}: {_why_uneven(slices, positions, normal, tolerance)}")
    return step


def _off_line(positions: np.ndarray) -> float:
    """The largest distance in mm between the positions and the best evenly spaced line.

    The line is the one with the smallest largest distance (Lawson's reweighted least squares), so
    that positions rounded to a tenth of a millimetre are not blamed for the rounding of both ends.
    """
    places = np.stack([np.ones(len(positions)), np.arange(len(positions))], axis=1)
    weights, best = np.full(len(positions), 1 / len(positions)), math.inf
    for _ in range(60):
        root = np.sqrt(weights)[:, None]
        line = np.linalg.lstsq(places * root, positions * root, rcond=None)[0]
        apart = np.linalg.norm(positions - places @ line, axis=1)
        best = min(best, float(apart.max()))
        weights = weights * apart
        if not weights.sum() > 0:
            break
        weights /= weights.sum()
    return best


def _why_uneven(
    slices: Sequence[DicomSlice], positions: np.ndarray, normal: np.ndarray, tolerance: float
) -> str:
    """The reason why slices are not evenly spaced on a line: shifted, missing or uneven gaps."""
    heights = positions @ normal
    aside = positions - np.outer(heights, normal)
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    lean = np.median(np.diff(aside, axis=0) / gaps[:, None], axis=0)
    off = aside - np.outer(heights, lean)
    off = np.linalg.norm(off - np.median(off, axis=0), axis=1)
    if off.max() > tolerance:
        worst = int(off.argmax())
        return f"{slices[worst].name} is shifted by {off[worst]:.3g} mm in its plane"
    if len(gaps) > 2 and (np.all(np.diff(gaps) > 0) or np.all(np.diff(gaps) < 0)):
        return f"the gaps between slices change steadily, from {gaps[0]:.3g} to {gaps[-1]:.3g} mm"
    missing = np.rint(gaps / usual) - 1
    if missing.max() >= 1 and np.abs(gaps / usual - missing - 1).max() < 0.1:
        worst = int(missing.argmax())
        return (
            f"{counted(int(missing.sum()), 'slice')} missing: {slices[worst].name} and"
            f" {slices[worst + 1].name} lie {gaps[worst]:.3g} mm apart, others {usual:.3g} mm"
        )
    odd = int(np.abs(gaps - usual).argmax())
    return (
        f"slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart; {slices[odd].name} and"
        f" {slices[odd + 1].name} differ most from the usual {usual:.3g} mm"
    )


def straightened(axes: np.ndarray, step: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Axes and step, made perpendicular if they deviate only by rounding.

    A step that leans by less than the tolerance over all slices is put upright; axes that are off
    by less than the tolerance of an orientation are turned to the step, which keeps every slice in
    its place. A real tilt stays.
    """
    normal = np.cross(*axes)
    length = float(np.linalg.norm(step))
    aside = float(np.linalg.norm(step - (step @ normal) * normal))
    if aside * (count - 1) <= max(PLACE_TOLERANCE[0], PLACE_TOLERANCE[1] * length):
        return axes, (step @ normal) * normal
    if aside / length <= TURN_TOLERANCE:
        along = step / length
        row = axes[0] - (axes[0] @ along) * along
        row /= np.linalg.norm(row)
        return np.stack([row, np.cross(along, row)]), step
    return axes, step
