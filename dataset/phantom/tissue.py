"""CT numbers for label maps: intensity and texture of each organ and of the unlabelled rest.

They replace scans in trials; they are no model of a scanner.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]


class Organ(NamedTuple):
    """HU of an organ after contrast medium; `sd` of its texture, `gas` its share of gas inside.

    wall: mm of tissue around contents of `inside` HU; 0 for a solid organ.
    """

    mean: float
    sd: float
    wall: float = 0.0
    inside: float = 0.0
    inside_sd: float = 0.0
    gas: float = 0.0


# Means: Buzug, Computed Tomography (2008), table of HU, and the ranges of Wikipedia's "Hounsfield
# scale"; what is not there, such as the contents of bowel, is chosen to be seen as in scans.
ORGANS = {
    "liver": Organ(105, 9),
    "spleen": Organ(115, 8),
    "left kidney": Organ(155, 22),
    "right kidney": Organ(155, 22),
    "stomach": Organ(65, 8, wall=5, inside=20, inside_sd=30, gas=0.25),
    "gallbladder": Organ(10, 4),
    "oesophagus": Organ(50, 8, wall=4, inside=20, inside_sd=20, gas=0.1),
    "pancreas": Organ(90, 14),
    "duodenum": Organ(65, 9, wall=4, inside=20, inside_sd=15, gas=0.1),
    "colon": Organ(60, 9, wall=3, inside=20, inside_sd=50, gas=0.4),
    "intestine": Organ(65, 10, wall=3, inside=30, inside_sd=15, gas=0.05),
    "adrenal": Organ(70, 8),
    "rectum": Organ(50, 8, wall=5, inside=20, inside_sd=30, gas=0.2),
    "bladder": Organ(6, 3),
    "left femoral head": Organ(280, 70),
    "right femoral head": Organ(280, 70),
}
NOT_ENHANCED = ("gallbladder", "bladder", "left femoral head", "right femoral head")
PHASE = 15.0  # HU, standard deviation of what all enhanced organs share in a patient
ORGAN_SPREAD = 8.0  # HU, the same of an organ by itself
AIR, FAT, SKIN_MUSCLE, GAS, BONE = -1000.0, -100.0, 55.0, -850.0, 220.0


def organ_of(name: str) -> Organ:
    """The organ of that name; a solid one, its HU drawn by the name, where the table has none."""
    drawn = zlib.crc32(name.encode()) % 1000 / 1000
    return ORGANS.get(name.lower(), Organ(20 + 110 * drawn, 10))


class Field:
    """A smooth random field through a patient, with mean 0 and standard deviation about 1.

    size: extent in mm along (z, y, x); grain: mm between independent values. `plane(z)` is the
    field at height z mm on a (side, side) grid that covers y and x.
    """

    def __init__(
        self, rng: np.random.Generator, size: tuple[float, float, float], grain: float
    ) -> None:
        counts = [int(np.ceil(extent / grain)) + 3 for extent in size]
        self._values = rng.standard_normal(counts, dtype=np.float32)
        self._grain, self._size = grain, size

    def plane(self, z: float, side: int) -> Plane:
        """Float32 (side, side) at height z: linear between layers, cubic within one."""
        below, part = divmod(z / self._grain, 1)
        lower, upper = self._values[int(below)], self._values[int(below) + 1]
        mixed = (1 - part) * lower + part * upper
        mixed /= np.sqrt((1 - part) ** 2 + part**2)
        step = self._size[1] / side / self._grain  # of the coarse grid, a pixel
        to_coarse = np.array([[step, 0, 1], [0, step, 1]], dtype=np.float64)
        how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        fine = cv2.warpAffine(mixed.astype(np.float32), to_coarse, (side, side), flags=how)
        return fine * np.float32(1.16)  # what interpolating the values took from their deviation


class Patient:
    """The look of one patient's tissues: drawn once, then evaluated plane by plane.

    names: of the labels 1, 2, ...; size: extent in mm along (z, y, x), y = x; body: half axes
    (across, front to back) in mm of the outline, centred on the planes.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        names: list[str],
        size: tuple[float, float, float],
        body: tuple[float, float],
    ) -> None:
        self._organs = [organ_of(name) for name in names]
        phase = rng.normal(0, PHASE)
        self._shift = [
            rng.normal(0, ORGAN_SPREAD) + phase * (name.lower() not in NOT_ENHANCED)
            for name in names
        ]
        self._body, self._width = body, size[1]
        self._fat = rng.uniform(10, 25)  # mm under the skin
        self._filled = rng.uniform(-0.2, 0.4)  # threshold: how much of the rest is not fat
        grains = {"outline": 60.0, "rest": 14.0, "kind": 20.0, "coarse": 7.0, "fine": 3.0}
        self._fields = {name: Field(rng, size, grain) for name, grain in grains.items()}
        self._contents = Field(rng, size, 16.0)

    def hounsfield(self, label: NDArray[np.uint8], z: float) -> Plane:
        """HU (side, side) of a label plane at height z mm, without noise."""
        side = len(label)
        fields = {name: field.plane(z, side) for name, field in self._fields.items()}
        values = self._background(fields, side)
        contents = self._contents.plane(z, side)
        texture = 0.8 * fields["coarse"] + 0.6 * fields["fine"]
        for number in np.unique(label[label > 0]):
            organ, shift = self._organs[number - 1], self._shift[number - 1]
            inside = label == number
            values[inside] = (organ.mean + shift + organ.sd * texture)[inside]
            if organ.wall:
                lumen = _eroded(inside, organ.wall * side / self._width)
                filling = organ.inside + organ.inside_sd * texture
                threshold = np.quantile(contents[lumen], organ.gas) if lumen.any() else 0
                values[lumen] = np.where(contents < threshold, GAS, filling)[lumen]
        return values

    def _background(self, fields: dict[str, Plane], side: int) -> Plane:
        """HU of everything unlabelled: air, fat, muscle, spine, and soft tissue like organs'."""
        y, x = np.mgrid[-0.5 : 0.5 : side * 1j, -0.5 : 0.5 : side * 1j].astype(np.float32)
        y, x = y * self._width, x * self._width
        across, depth = self._body
        radius = (np.abs(x / across) ** 2.4 + np.abs(y / depth) ** 2.4) ** (1 / 2.4)
        skin = (1 - radius + 0.02 * fields["outline"]) * min(across, depth)  # mm below the skin
        soft = 45 + 30 * fields["kind"] + 8 * fields["fine"]
        values = np.where(fields["rest"] > self._filled, soft, FAT + 8 * fields["coarse"])
        wall = self._fat + 3 * fields["outline"]
        values = np.where(skin < wall + 12, SKIN_MUSCLE + 8 * fields["coarse"], values)
        values = np.where(skin < wall, FAT + 6 * fields["coarse"], values)
        spine = np.hypot(x, y - (depth - self._fat - 38)) < 22 + 2 * fields["outline"]
        values = np.where(spine, BONE + 60 * fields["coarse"], values)
        return np.where(skin < 0, AIR, values).astype(np.float32)


def _eroded(mask: NDArray[np.bool_], pixels: float) -> NDArray[np.bool_]:
    """The mask without the given number of pixels at its edge."""
    return cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3) > pixels


def scanner_noise(rng: np.random.Generator, side: int, sd: float) -> Plane:
    """Noise (side, side) of standard deviation sd HU, with the grain of a reconstructed slice."""
    white = rng.standard_normal((side, side), dtype=np.float32)
    blurred = cv2.GaussianBlur(white, (0, 0), 0.6)
    return blurred * np.float32(sd / blurred.std())
