"""The rectum of a drawn pelvis: a curved tube with contents and, on one side, a tumour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataset.phantom.shapes import ANGLES, Shape, Tissue, front_part, rim, waves


@dataclass(frozen=True)
class Tumour:
    """Where a tumour sits and how thick it is.

    angle and half_width in radians around the rectum (0 left, pi / 2 posterior), twist in
    radians per mm of height; level and half_height in mm along z; thickness in mm at its
    thickest; growth is the share that grows outwards; phases (4,) of its uneven surface.
    """

    angle: float
    half_width: float
    twist: float
    level: float
    half_height: float
    thickness: float
    growth: float
    phases: NDArray[np.float64]

    def thickening(self, z: float) -> NDArray[np.float64]:
        """Extra wall thickness at each of ANGLES at height z (mm); (72,) mm."""
        height = 1 - ((z - self.level) / self.half_height) ** 2
        if height <= 0:
            return np.zeros_like(ANGLES)
        centre = self.angle + self.twist * (z - self.level)
        away = np.abs((ANGLES - centre + np.pi) % (2 * np.pi) - np.pi)
        half_width = self.half_width * height**0.25
        bump = np.cos(np.clip(away / half_width, 0, 1) * np.pi / 2) ** 0.7
        uneven = 1 + waves(0.1, self.phases, z / 12)
        return self.thickness * np.sqrt(height) * bump * uneven


@dataclass(frozen=True)
class Rectum:
    """A rectum: radii, bends and contents over its height.

    radius and wall in mm; stretch (2,) of its cross section; bend (mm) and period (mm) of its
    side to side course; phases (11,); swell, the relative change of radius along z; opening, the
    share of the room inside the wall that contents hold open; aslant (2,), how far a lumen that
    is not fully open lies off the centre, as a share of the room there is, and in which
    direction; gas, the part of the lumen's height filled with gas, in front, as patients lie on
    their back (none below 0); filling, the tissue behind it.
    """

    radius: float
    wall: float
    stretch: NDArray[np.float64]
    bend: float
    period: float
    phases: NDArray[np.float64]
    swell: float
    opening: float
    aslant: NDArray[np.float64]
    gas: float
    filling: Tissue
    tumour: Tumour

    def size(self, z: float) -> float:
        """Mean outer radius of the normal rectum at height z, mm."""
        return self.radius * (1 + self.swell * np.sin(z / self.period * 2 + self.phases[1]))

    def aside(self, z: float) -> float:
        """How far the rectum lies left of the midline at height z, mm."""
        return self.bend * np.sin(z / self.period + self.phases[0])

    def shapes(self, z: float, centre: NDArray[np.float64]) -> list[Shape]:
        """The strokes that paint the rectum at height z around centre (2,) mm, wall first."""
        outer = self.size(z) * (1 + waves(0.05, self.phases[2:6], z / 30))
        opening = np.clip(self.opening + 0.15 * np.sin(z / 14 + self.phases[6]), 0.15, 1.0)
        folds = 1 + waves(0.12 + 0.2 * (1 - opening), self.phases[6:10], z / 15)
        room = outer - self.wall
        offset = self.aslant[0] * np.cos(ANGLES - self.aslant[1] - z / 40)
        inner = np.minimum(room * (opening * folds + (1 - opening) * offset), room)
        extra = self.tumour.thickening(z)
        grown = outer + self.tumour.growth * extra
        lumen = np.clip(np.minimum(inner, grown - self.wall - extra), 1.0, None)
        painted = [
            Shape(Tissue.RECTAL_WALL, rim(grown, self.stretch, centre)),
            *self._contents(z, rim(lumen, self.stretch, centre)),
        ]
        ill = extra > 0.25 * self.tumour.thickness
        if ill.any():
            first = int(np.argmax(ill & ~np.roll(ill, 1)))
            span = (first + np.arange(ill.sum())) % len(ANGLES)
            outside = rim(grown - 0.5, self.stretch, centre)[span]
            inside = rim(np.minimum(lumen, grown - extra), self.stretch, centre)[span]
            painted.append(Shape(Tissue.TUMOUR, np.concatenate([outside, inside[::-1]])))
        return painted

    def _contents(self, z: float, lumen: NDArray[np.float64]) -> list[Shape]:
        """Stool or fluid with gas above it; lumen (72, 2) mm."""
        gas = front_part(lumen, self.gas + 0.2 * np.sin(z / 17 + self.phases[10]))
        return [Shape(self.filling, lumen), Shape(Tissue.RECTAL_GAS, gas)]


def draw_rectum(generator: np.random.Generator, levels: NDArray[np.float64]) -> Rectum:
    """A rectum drawn at random, its tumour reaching over most of the given heights.

    levels (S,) mm, the heights of the case's slices. On CT, normal walls of a distended rectum
    are up to 3 mm thick, walls over 6 mm are suspicious and most tumours are longer than 20 mm;
    walls are drawn a little thicker, to be seen at 112 pixels.
    """
    uniform = generator.uniform
    low, high = levels[0], levels[-1]
    tumour = Tumour(
        angle=uniform(0, 2 * np.pi),
        half_width=uniform(1.1, 1.8),
        twist=uniform(-0.012, 0.012),
        level=low + (high - low) * uniform(0.2, 0.8),
        half_height=max(high - low, 10.0) * uniform(0.25, 0.46),
        thickness=uniform(13, 20),
        growth=uniform(0.2, 0.45),
        phases=uniform(0, 2 * np.pi, 4),
    )
    filling = generator.choice([Tissue.RECTAL_STOOL, Tissue.RECTAL_STOOL, Tissue.RECTAL_FLUID])
    return Rectum(
        radius=uniform(19, 26),
        wall=uniform(3.5, 5.5),
        stretch=np.array([uniform(0.95, 1.2), uniform(0.85, 1.05)]),
        bend=uniform(5, 18),
        period=uniform(20, 35),
        phases=uniform(0, 2 * np.pi, 11),
        swell=uniform(0.04, 0.12),
        opening=uniform(0.4, 0.95),
        aslant=uniform((0.3, 0), (1.0, 2 * np.pi)),
        gas=uniform(-0.5, 0.7),
        filling=Tissue(int(filling)),
        tumour=tumour,
    )
