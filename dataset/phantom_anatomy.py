"""A pelvis drawn at random and cut at any height: skin, fat, muscle, bones, organs, bowel.

dataset/phantom.py paints the outlines; positions are those of an adult lying on the back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataset.phantom_rectum import Rectum, draw_rectum
from dataset.phantom_shapes import Shape, Tissue, bezier, plate, rim, ring, waves

HEAD_RADIUS = 23.0  # mm, an adult's femoral head
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
    between muscles; bladder (x, y, z, and three radii); phases (40, 4), the unevenness of each
    structure; jitter (60, 2), its displacement in [-1, 1]; vessel_radii (8,); scale (2,), turn
    (radians) and shift (2,), the patient's size and position on the table.
    """

    female: bool
    half_size: NDArray[np.float64]
    fat: float
    plane: float
    bladder: NDArray[np.float64]
    sacrum_y: float
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
        loops=tuple(_draw_loop(generator) for _ in range(generator.integers(7, 13))),
        rectum=draw_rectum(generator, levels),
        phases=uniform(0, 2 * np.pi, (40, 4)),
        jitter=uniform(-1, 1, (60, 2)),
        scale=uniform(0.93, 1.04) * uniform(0.97, 1.03, 2),
        turn=uniform(-0.1, 0.1),
        shift=uniform((-8, -10), (8, 10)),
    )


def _draw_loop(generator: np.random.Generator) -> Loop:
    """A loop of small or sigmoid bowel above or beside the bladder."""
    uniform = generator.uniform
    contents = [Tissue.BOWEL_FLUID, Tissue.BOWEL_STOOL, Tissue.BOWEL_STOOL, Tissue.BOWEL_WALL]
    return Loop(
        centre=uniform((-42, -62, 0), (42, 0, 65)),
        radii=uniform((10, 9, 10), (24, 16, 30)),
        tilt=uniform(-1.2, 1.2),
        wall=uniform(2, 4),
        contents=Tissue(int(generator.choice(contents))),
        gas=uniform(-0.4, 1.0),
    )


def cut(anatomy: Anatomy, z: float) -> list[Shape]:
    """Every stroke of the slice at height z mm, in painting order, in the scanner's frame."""
    strokes = [
        *_outside(anatomy, z),
        *_cavity(anatomy, z),
        *_muscles(anatomy, z),
        *_hips(anatomy, z),
        *_sacrum(anatomy, z),
        *_vessels(anatomy, z),
        *_bowel(anatomy, z),
        *_organs(anatomy, z),
        *_mesorectum(anatomy, z),
        *anatomy.rectum.shapes(z, rectum_centre(anatomy, z)),
    ]
    cos, sin = np.cos(anatomy.turn), np.sin(anatomy.turn)
    turn = np.array([[cos, sin], [-sin, cos]])
    return [
        stroke._replace(points=(stroke.points * anatomy.scale) @ turn + anatomy.shift)
        for stroke in strokes
    ]


def table(anatomy: Anatomy) -> list[Shape]:
    """The table's two shells, just below the patient, and the cable channel under it."""
    back = anatomy.shift[1] + 1.02 * anatomy.scale[1] * anatomy.half_size[1] + 9
    x = np.linspace(-150, 150, 41)
    shell = np.stack([x, back - 24 * (x / 150) ** 2], axis=1)
    channel = np.array([[-48.0, back + 34], [48.0, back + 34]])
    return [
        Shape(Tissue.TABLE, shell, 2.0, closed=False),
        Shape(Tissue.TABLE, channel + anatomy.shift[0] / 2, 1.5, closed=False),
    ]


def sacrum_size(anatomy: Anatomy, z: float) -> NDArray[np.float64]:
    """Half width and half depth (2,) mm of the sacrum, or below it of the coccyx."""
    rise = np.clip((z - 2) / 55, 0, 1)
    return np.array([8 + 44 * rise**0.8, 5.5 + 9 * rise])


def sacrum_centre(anatomy: Anatomy, z: float) -> NDArray[np.float64]:
    """Centre (2,) mm of the sacrum or coccyx: its curve is hollow towards the rectum."""
    return np.array([0.0, anatomy.sacrum_y - 0.011 * (z - 22) ** 2])


def rectum_centre(anatomy: Anatomy, z: float) -> NDArray[np.float64]:
    """Centre (2,) mm of the rectum, in the hollow of the sacrum."""
    rectum = anatomy.rectum
    front = sacrum_centre(anatomy, z)[1] - sacrum_size(anatomy, z)[1]
    gap = 7 + 4 * anatomy.jitter[0, 0] + max(z - 10, 0) * 0.12
    return np.array([rectum.aside(z), front - gap - rectum.size(z) * rectum.stretch[1]])


def _outside(anatomy: Anatomy, z: float) -> list[Shape]:
    """Skin, the fat below it and the muscle compartment."""
    half = anatomy.half_size * (1 - 0.0006 * max(z, 0)) + np.array([0.08 * -z, 0])
    body = ring((0, 0), half, wobble=anatomy.uneven(0, z / 2, 0.008), power=2.35)
    depth = anatomy.half_size[1]
    cleft = np.exp(-((body[:, 0] / 9) ** 2)) * (body[:, 1] > 0)
    body[:, 1] -= cleft * np.clip(20 - 0.6 * z, 2, 20)
    flat = np.clip(-body[:, 1] / depth, 0, 1)  # the belly of a patient on the back is flat
    body[:, 1] += 6 * flat**2 * np.exp(-((body[:, 0] / 70) ** 2))
    inset = 1 - (anatomy.fat * np.array([1.0, 0.9])) / half
    flesh = body * inset + np.array([0, -1.0])
    return [
        Shape(Tissue.SKIN, body),
        Shape(Tissue.FAT, body * (1 - 2.2 / half)),
        Shape(Tissue.MUSCLE, flesh),
    ]


def _cavity(anatomy: Anatomy, z: float) -> list[Shape]:
    """The fat that fills the pelvis between its walls."""
    half_width = 50 + 0.22 * max(z, 0)
    rear = sacrum_centre(anatomy, z)[1]
    front = -0.72 * anatomy.half_size[1] + 0.3 * anatomy.fat
    centre, half = (0, (front + rear) / 2), (half_width, (rear - front) / 2)
    return [
        Shape(Tissue.DEEP_FAT, ring(centre, half, power=2.8, wobble=anatomy.uneven(1, z, 0.02)))
    ]


def _muscles(anatomy: Anatomy, z: float) -> list[Shape]:
    """Fat planes that part the muscles, and the muscles that line the pelvis."""
    wide, deep = anatomy.half_size - anatomy.fat
    strokes = []
    for side in SIDES:
        row = 4 + side
        buttock = bezier((side * wide, -4), (side * 0.72 * wide, 34), (side * 40, 0.86 * deep))
        middle = bezier((side * wide * 0.97, -22), (side * 108, 6), (side * 92, 34))
        front = bezier((side * 104, -0.66 * deep), (side * 104, -30), (side * 122, -20))
        groin = bezier((side * 62, -0.92 * deep), (side * 76, -52), (side * 108, -48))
        for number, (path, width) in enumerate(
            [(buttock, 1.5), (middle, 0.9), (front, 1.0), (groin, 1.2)]
        ):
            moved = path + 4 * anatomy.jitter[row * 4 + number]
            thickness = anatomy.plane * width * np.linspace(1.7, 0.6, len(path))
            strokes.append(Shape(Tissue.DEEP_FAT, plate(moved, thickness)))
        fossa = anatomy.near(row + 8, (side * 72, 52), 3)
        size = np.array([13, 7]) * (0.5 + 0.25 * anatomy.plane) * np.clip(1.2 - z / 40, 0.4, 1.3)
        strokes.append(Shape(Tissue.DEEP_FAT, ring(fossa, size, tilt=-0.7 * side)))
        lining = anatomy.uneven(row + 10, z, 0.06)
        if z < 32:
            centre = anatomy.near(row + 12, (side * (45 + 0.2 * max(z, 0)), 8), 2)
            obturator = ring(centre, (8, 36), wobble=lining, tilt=0.12 * side, power=2.6)
            strokes.append(Shape(Tissue.MUSCLE, obturator))
        else:
            piriformis = ring((side * 68, 48), (26, 9), wobble=lining, tilt=-0.35 * side)
            strokes.append(Shape(Tissue.MUSCLE, piriformis))
            psoas = anatomy.near(row + 14, (side * 68, -32), 3)
            strokes.append(Shape(Tissue.MUSCLE, ring(psoas, (17, 21), wobble=lining)))
    return strokes + _front_muscles(anatomy, z)


def _front_muscles(anatomy: Anatomy, z: float) -> list[Shape]:
    """The fat between skin and groin and the muscles in it; the straight belly muscles."""
    wide, deep = anatomy.half_size - anatomy.fat
    strokes = []
    for side in SIDES:
        row = 20 + side
        lining = anatomy.uneven(row, z, 0.06)
        groin = anatomy.near(row, (side * 66, -0.80 * deep), 3)
        strokes.append(Shape(Tissue.DEEP_FAT, ring(groin, (24, 15), tilt=0.3 * side)))
        for number, (x, y, a, b) in enumerate(
            [(66, -50, 20, 16), (98, -60, 10, 8), (116, -52, 12, 9), (82, -68, 8, 6)]
        ):
            centre = anatomy.near(row + 3 * number + 2, (side * x, y), 2.5)
            size = np.array([a, b]) - 0.4 * anatomy.plane
            around = ring(centre, size + anatomy.plane, wobble=lining, tilt=0.5 * side)
            within = ring(centre, size, wobble=lining, tilt=0.5 * side)
            strokes += [Shape(Tissue.DEEP_FAT, around), Shape(Tissue.MUSCLE, within)]
        belly = (side * 22, -deep + 9)
        strokes.append(Shape(Tissue.MUSCLE, ring(belly, (24, 5.5), tilt=0.16 * side, power=2.6)))
    return strokes


def _hips(anatomy: Anatomy, z: float) -> list[Shape]:
    """Femoral heads and trochanters, hip sockets, and above them the wings of the ilium."""
    strokes = []
    for side in SIDES:
        head = anatomy.near(30 + side, (side * 86, -18), 3)
        level = z + 4 * anatomy.jitter[33, 0] * side
        if level > HEAD_RADIUS - 2:
            strokes += _ilium(side, level)
            continue
        if level > -30:
            strokes += _socket(head, side, level)
        radius = np.sqrt(max(HEAD_RADIUS**2 - level**2, 0))
        if radius > 4:
            strokes += _bone(ring(head, (radius, radius)), 1.6)
        if level < 8:
            size = np.array([13, 17]) * np.clip((12 - level) / 16, 0.3, 1.0)
            outline = ring(head + (side * 42, 20), size, tilt=0.5 * side)
            strokes += _bone(outline, 1.6)
        if level < -6:
            neck = plate([head + (side * 8, 2), head + (side * 36, 16)], (22, 20))
            strokes += [*_bone(neck, 1.6), Shape(Tissue.MARROW, ring(head, (13, 13)))]
        if level < -14:
            ramus = bezier(head + (-side * 20, -22), (side * 45, -56), (side * 6, -58))
            strokes += _bone(plate(ramus, 12.0), 2.0)
    return strokes


def _socket(head: NDArray[np.float64], side: int, level: float) -> list[Shape]:
    """The socket around a femoral head: a horseshoe open to the side, thick at its ends."""
    angles = np.linspace(-1.75, 1.9, 24)  # radians from medial, positive towards posterior
    inside = np.sqrt(max(HEAD_RADIUS**2 - (0.8 * level) ** 2, 64)) + 4.5
    spine = 13 * np.exp(-(((angles - 0.95) / 0.45) ** 2))  # the ischial spine and column
    front = 8 * np.exp(-(((angles + 1.1) / 0.4) ** 2))
    outside = inside + 5 + spine + front
    ray = np.stack([-side * np.cos(angles), np.sin(angles)], axis=1)
    outline = np.concatenate([head + inside * ray, (head + outside[:, None] * ray)[::-1]])
    return _bone(outline, 2.2)


def _ilium(side: int, level: float) -> list[Shape]:
    """The wing of the ilium, longer the higher it is cut."""
    reach = np.clip((level - 20) / 40, 0, 1)
    front = np.array([side * (98 + 10 * reach), -30 - 22 * reach])
    rear = np.array([side * (66 - 12 * reach), 22 + 38 * reach])
    path = bezier(front, (side * (76 + 8 * reach), -4), rear)
    thickness = np.linspace(19, 13, len(path)) - 4 * reach
    thickness *= np.sin(np.linspace(0.35, np.pi - 0.35, len(path))) ** 0.4  # rounded ends
    return _bone(plate(path, thickness), 2.4)


def _bone(outline: NDArray[np.float64], cortex: float) -> list[Shape]:
    """Spongy bone with a cortex of so many mm."""
    return [Shape(Tissue.MARROW, outline), Shape(Tissue.CORTEX, outline, cortex)]


def _sacrum(anatomy: Anatomy, z: float) -> list[Shape]:
    """Sacrum or coccyx, with the nerves' foramina where it is wide."""
    centre, (wide, deep) = sacrum_centre(anatomy, z), sacrum_size(anatomy, z)
    outline = ring(centre, (wide, deep), wobble=anatomy.uneven(2, z, 0.06), power=2.2)
    hollow = np.exp(-((outline[:, 0] / (0.6 * wide)) ** 2)) * (outline[:, 1] < centre[1])
    outline[:, 1] += 0.3 * deep * hollow
    strokes = _bone(outline, 1.8)
    if wide > 24:
        for side in SIDES:
            foramen = centre + (side * 0.42 * wide, -0.15 * deep)
            strokes.append(Shape(Tissue.DEEP_FAT, ring(foramen, (3.5, 3))))
            strokes.append(Shape(Tissue.MUSCLE, ring(foramen, (1.8, 1.6))))
    return strokes


def _vessels(anatomy: Anatomy, z: float) -> list[Shape]:
    """External iliac or femoral vessels in front, branches of the internal iliac behind."""
    deep = anatomy.half_size[1] - anatomy.fat
    strokes = []
    for side in SIDES:
        row = 40 + 2 * side
        front = np.array([side * (58 - 0.25 * max(z, 0)), -0.80 * deep + 0.5 * max(z, 0)])
        for number, (shift, radius) in enumerate([((4, 0), 4.5), ((-7, 3), 5.5)]):
            centre = front + np.array(shift) * (side, 1) + 2 * anatomy.jitter[row + number]
            strokes.append(Shape(Tissue.VESSEL, ring(centre, (radius, radius))))
        for number in range(5):
            drift = anatomy.jitter[row + 4 + number]
            x = side * (34 + 6 * drift[0] + 0.1 * z)
            y = 10 + 13 * number - 14 + 5 * np.sin(z / 12 + 3 * drift[1])
            radius = 1.4 + 0.9 * abs(drift[1])
            strokes.append(Shape(Tissue.VESSEL, ring((x, y), (radius, 1.3 * radius))))
    return strokes


def _organs(anatomy: Anatomy, z: float) -> list[Shape]:
    """Bladder, and behind it prostate and seminal vesicles or uterus and vagina."""
    x, y, level, *radii = anatomy.bladder
    limit = rectum_centre(anatomy, z)[1] - 1.15 * anatomy.rectum.size(z)
    strokes = []
    if anatomy.female:
        womb = np.sqrt(max(1 - ((z - 26) / 24) ** 2, 0))
        if womb > 0.2:
            centre = anatomy.near(44, (0, min(limit - 12, y + 34)), 4)
            size = np.array([26, 16]) * womb
            strokes.append(Shape(Tissue.GLAND, ring(centre, size, wobble=anatomy.uneven(5, z))))
        if z < 8:
            vagina = ring((0, limit - 5), (15, 4.5), wobble=anatomy.uneven(6, z))
            strokes.append(Shape(Tissue.GLAND, vagina))
    else:
        prostate = np.sqrt(max(1 - ((z + 20) / 22) ** 2, 0))
        if prostate > 0.2:
            size = np.array([24, 18]) * prostate
            centre = (anatomy.jitter[45, 0], limit - size[1] + 1)
            strokes.append(Shape(Tissue.GLAND, ring(centre, size, wobble=anatomy.uneven(7, z))))
        if -4 < z < 16:
            for side in SIDES:
                vesicle = ring((side * 15, limit - 5), (16, 4.5), tilt=0.3 * side)
                strokes.append(Shape(Tissue.GLAND, vesicle))
    height = np.sqrt(max(1 - ((z - level) / radii[2]) ** 2, 0))
    if height > 0.15:
        size = np.array(radii[:2]) * height
        rim_ = anatomy.uneven(8, z, 0.04)
        outline = ring((x, y), size, wobble=rim_, power=2.4)
        strokes += [
            Shape(Tissue.BOWEL_WALL, outline),
            Shape(Tissue.URINE, ring((x, y), size - 2.8, wobble=rim_, power=2.4)),
        ]
    return strokes


def _bowel(anatomy: Anatomy, z: float) -> list[Shape]:
    """Loops of other bowel with walls and contents like the rectum's."""
    strokes = []
    for row, loop in enumerate(anatomy.loops):
        height = np.sqrt(max(1 - ((z - loop.centre[2]) / loop.radii[2]) ** 2, 0))
        if height < 0.3:
            continue
        size = loop.radii[:2] * height
        rim_ = anatomy.uneven(10 + row, z, 0.07)
        outer = ring(loop.centre[:2], size, wobble=rim_, tilt=loop.tilt)
        inner = ring(loop.centre[:2], np.maximum(size - loop.wall, 1), wobble=rim_, tilt=loop.tilt)
        around = ring(loop.centre[:2], size + 1.5, wobble=rim_, tilt=loop.tilt)
        top, bottom = inner[:, 1].min(), inner[:, 1].max()
        surface = top + np.clip(loop.gas, 0, 1) * (bottom - top)
        gas = np.stack([inner[:, 0], np.minimum(inner[:, 1], surface)], axis=1)
        strokes += [
            Shape(Tissue.DEEP_FAT, around),
            Shape(Tissue.BOWEL_WALL, outer),
            Shape(loop.contents, inner),
            Shape(Tissue.BOWEL_GAS, gas),
        ]
    return strokes


def _mesorectum(anatomy: Anatomy, z: float) -> list[Shape]:
    """The rectum's fat with small vessels and nodes, and the sling of the pelvic floor."""
    centre, radius = rectum_centre(anatomy, z), anatomy.rectum.size(z)
    reach = np.array([radius + 9, radius + 5]) * anatomy.rectum.stretch
    strokes = [Shape(Tissue.DEEP_FAT, ring(centre, reach, wobble=anatomy.uneven(30, z)))]
    if z < 4:
        sling = ring(centre + (0, 2), reach + 1)
        rear = sling[(sling[:, 1] > centre[1] - 6)]
        rear = rear[np.argsort(np.arctan2(rear[:, 0] - centre[0], rear[:, 1] - centre[1]))]
        strokes.append(Shape(Tissue.MUSCLE, rear, 3.5, closed=False))
    for number in range(7):
        drift = anatomy.jitter[50 + number]
        angle = np.pi * (drift[0] + 0.2 * np.sin(z / 20 + number))
        place = centre + (reach - 4) * (np.cos(angle), np.sin(angle))
        size = 1.2 + 1.4 * abs(drift[1])
        strokes.append(Shape(Tissue.VESSEL, ring(place, (size, size))))
    return strokes
