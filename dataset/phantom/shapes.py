"""Tissues and closed outlines in millimetres, which a drawn pelvis is made of."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ANGLES = np.linspace(0, 2 * np.pi, 72, endpoint=False)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
HARMONICS = np.arange(2, 6)
HARMONIC_COS = np.cos(np.outer(HARMONICS, ANGLES))  # (4, 72)
HARMONIC_SIN = np.sin(np.outer(HARMONICS, ANGLES))


class Tissue(IntEnum):
    """Tissue types; the numbers are those of the painted tissue map."""

    AIR = 0
    SKIN = 1
    FAT = 2
    DEEP_FAT = 3
    MUSCLE = 4
    CORTEX = 5
    MARROW = 6
    URINE = 7
    GLAND = 8
    VESSEL = 9
    BOWEL_WALL = 10
    BOWEL_FLUID = 11
    BOWEL_STOOL = 12
    BOWEL_GAS = 13
    RECTAL_WALL = 14
    RECTAL_FLUID = 15
    RECTAL_STOOL = 16
    RECTAL_GAS = 17
    TUMOUR = 18
    TABLE = 19


class Shape(NamedTuple):
    """One painted shape: an outline and the tissue it is filled or drawn with.

    points (n, 2) float, mm, (x, y) with x towards the patient's left and y towards posterior.
    width 0 fills the outline, otherwise the outline is drawn as a line of that many mm;
    closed joins the line's ends.
    """

    tissue: Tissue
    points: NDArray[np.float64]
    width: float = 0.0
    closed: bool = True


def ring(
    centre: ArrayLike,
    radii: ArrayLike,
    *,
    wobble: ArrayLike = 0.0,
    tilt: float = 0.0,
    power: float = 2.0,
) -> NDArray[np.float64]:
    """Outline of an ellipse, more boxy for a power above 2, with an uneven rim.

    centre and radii (2,) mm; wobble scalar or (72,), the relative change of the radius at
    ANGLES; tilt in radians, positive from left towards posterior. Returns (72, 2) mm.
    """
    radius = 1.0 + np.asarray(wobble)
    if power != 2.0:
        radius = radius * (np.abs(COS) ** power + np.abs(SIN) ** power) ** (-1 / power)
    x, y = radii[0] * radius * COS, radii[1] * radius * SIN
    cos, sin = np.cos(tilt), np.sin(tilt)
    return np.stack([centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y], axis=1)


def rim(radius: ArrayLike, stretch: ArrayLike, centre: ArrayLike) -> NDArray[np.float64]:
    """Outline with its own radius at each of ANGLES.

    radius (72,) mm; stretch (2,) factors along x and y; centre (2,) mm. Returns (72, 2) mm.
    """
    return np.stack(
        [centre[0] + stretch[0] * radius * COS, centre[1] + stretch[1] * radius * SIN], axis=1
    )


def waves(amplitude: float, phases: NDArray[np.float64], turn: float) -> NDArray[np.float64]:
    """Relative unevenness of a rim: harmonics 2 to 5, weaker as they get finer.

    phases (4,) radians; turn in radians moves every harmonic along, so that neighbouring
    slices differ a little. Returns (72,), of the order of amplitude.
    """
    angle = phases + turn
    weight = amplitude * np.array([1.0, 0.7, 0.5, 0.35])
    return (weight * np.cos(angle)) @ HARMONIC_COS + (weight * np.sin(angle)) @ HARMONIC_SIN


def plate(path: ArrayLike, thickness: ArrayLike) -> NDArray[np.float64]:
    """Outline of a plate along a path, such as a wing of the ilium.

    path (n, 2) mm; thickness scalar or (n,) mm. Returns (2 n, 2) mm.
    """
    path = np.asarray(path, dtype=float)
    along = np.gradient(path, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    half = normal * (np.broadcast_to(thickness, len(path)) / 2)[:, None]
    return np.concatenate([path + half, (path - half)[::-1]])


def bezier(start: ArrayLike, bend: ArrayLike, end: ArrayLike) -> NDArray[np.float64]:
    """Quadratic curve from start to end drawn towards bend; each (2,) mm, returns (12, 2)."""
    t = np.linspace(0, 1, 12)[:, None]
    start, bend, end = (np.asarray(point, dtype=float) for point in (start, bend, end))
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end


def front_part(outline: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Outline of the part in front of a level surface, such as gas over fluid.

    outline (n, 2) mm; share of its height, front to back, taken. Returns (m, 2) mm with m = 0
    where less than a sliver is left.
    """
    top, bottom = outline[:, 1].min(), outline[:, 1].max()
    kept = outline[outline[:, 1] < top + share * (bottom - top)]
    return kept if len(kept) > 3 else kept[:0]
