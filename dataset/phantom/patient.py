"""One patient drawn at random: sizes, positions and unevenness of everything in a slice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataset.phantom.rectum import Rectum, draw_rectum
from dataset.phantom.shapes import Tissue, waves

SIDES = (-1, 1)  # the patient's right and left


@dataclass(frozen=True)
class Loop:
    """A loop of bowel: an ellipsoid at (x, y, z) with radii and contents; tilt in radians."""

    centre: NDArray[np.float64]
    radii: NDArray[np.float64]
    tilt: float
    wall: float
    contents: Tissue
    gas: float


@dataclass(frozen=True)
class Anatomy:
    """One patient: sizes in mm, heights above the centre of the femoral heads.

    half_size (2,) of the body; fat, its thickness under the skin; plane, the width of fat
    between muscles; bladder (x, y, z, and three radii);
    mesorectum, the thickness of the fat around the rectum; phases (40, 4), the unevenness of each
    structure; jitter (60, 2), its displacement in [-1, 1]; vessel_radii (8,); scale (2,), turn
    (radians) and shift (2,), the patient's size and position on the table.
    """

    female: bool
    half_size: NDArray[np.float64]
    fat: float
    plane: float
    bladder: NDArray[np.float64]
    sacrum_y: float
    mesorectum: float
    loops: tuple[Loop, ...]
    rectum: Rectum
    phases: NDArray[np.float64]
    jitter: NDArray[np.float64]
    scale: NDArray[np.float64]
    turn: float
    shift: NDArray[np.float64]

    def uneven(self, row: int, z: float, amplitude: float = 0.05) -> NDArray[np.float64]:
        """Relative radius (72,) of structure number row's rim at height z."""
        return waves(amplitude, self.phases[row % len(self.phases)], z / 25)

    def near(self, row: int, point: tuple[float, float], reach: float) -> NDArray[np.float64]:
        """The point (2,), displaced by up to reach mm as drawn for structure number row."""
        return np.asarray(point) + reach * self.jitter[row % len(self.jitter)]


def draw_anatomy(generator: np.random.Generator, levels: NDArray[np.float64]) -> Anatomy:
    """A patient drawn at random; levels (S,) mm are the heights that will be cut."""
    uniform = generator.uniform
    fat = uniform(8, 24)
    return Anatomy(
        female=bool(generator.integers(2)),
        half_size=np.array([uniform(146, 154) + 0.5 * fat, uniform(90, 98) + 0.6 * fat]),
        fat=fat,
        plane=uniform(1.0, 3.5),
        bladder=np.concatenate(
            [uniform((-8, -40, -8), (8, -30, 8)), uniform((24, 18, 22), (38, 28, 38))]
        ),
        sacrum_y=uniform(70, 76),
        mesorectum=uniform(0.5, 6.0),
        loops=(
            *(_draw_loop(generator, upper=True) for _ in range(generator.integers(6, 12))),
            *(_draw_loop(generator, upper=False) for _ in range(generator.integers(2, 5))),
        ),
        rectum=draw_rectum(generator, levels),
        phases=uniform(0, 2 * np.pi, (40, 4)),
        jitter=uniform(-1, 1, (60, 2)),
        scale=uniform(0.93, 1.04) * uniform(0.97, 1.03, 2),
        turn=uniform(-0.14, 0.14),
        shift=uniform((-8, -10), (8, 10)),
    )


def _draw_loop(generator: np.random.Generator, *, upper: bool) -> Loop:
    """A loop of small or sigmoid bowel: above and beside the bladder, or low beside the rectum."""
    uniform = generator.uniform
    contents = [Tissue.BOWEL_FLUID, Tissue.BOWEL_STOOL, Tissue.BOWEL_STOOL, Tissue.BOWEL_WALL]
    side = generator.choice(SIDES)
    low, high = ((-42, -62, 0), (42, 0, 65)) if upper else ((24, -6, -16), (40, 32, 40))
    centre = uniform(low, high)
    return Loop(
        centre=centre if upper else centre * (side, 1, 1),
        radii=uniform((10, 9, 10), (24, 16, 30)) if upper else uniform((8, 9, 14), (12, 15, 30)),
        tilt=uniform(-1.2, 1.2) if upper else uniform(-0.3, 0.3),
        wall=uniform(2, 4),
        contents=Tissue(int(generator.choice(contents))),
        gas=uniform(-0.4, 1.0),
    )
