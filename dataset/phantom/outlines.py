"""A patient cut at any height: outlines of skin, fat, muscle, bones, organs, bowel and rectum.

Positions are those of an adult lying on the back.
"""

from __future__ import annotations

import numpy as np

from dataset.phantom.bones import hips, sacrum, sacrum_centre, sacrum_size
from dataset.phantom.patient import SIDES, Anatomy
from dataset.phantom.shapes import Shape, Tissue, bezier, front_part, plate, ring


def cut(anatomy: Anatomy, z: float) -> list[Shape]:
    """Every stroke of the slice at height z mm, in painting order, in the scanner's frame."""
    strokes = [
        *_outside(anatomy, z),
        *_cavity(anatomy, z),
        *_muscles(anatomy, z),
        *hips(anatomy, z),
        *sacrum(anatomy, z),
        *_vessels(anatomy, z),
        *_mesorectum(anatomy, z),
        *_bowel(anatomy, z),
        *_organs(anatomy, z),
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
        Shape(Tissue.TABLE, shell, 2.6, closed=False),
        Shape(Tissue.TABLE, channel + anatomy.shift[0] / 2, 2.0, closed=False),
    ]


def rectum_centre(anatomy: Anatomy, z: float) -> np.ndarray:
    """Centre (2,) mm of the rectum, in the hollow of the sacrum."""
    rectum = anatomy.rectum
    front = sacrum_centre(anatomy, z)[1] - sacrum_size(anatomy, z)[1]
    gap = 1.5 + anatomy.mesorectum + max(z - 10, 0) * 0.1
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
    """Fat planes that separate the muscles, and the muscles that line the pelvis."""
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
    """The fat between skin and groin and the muscles in it; the rectus muscles."""
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
    front = anatomy.rectum.size(z) * anatomy.rectum.stretch[1] + 0.7 * anatomy.mesorectum
    limit = rectum_centre(anatomy, z)[1] - front
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
        strokes += [
            Shape(Tissue.DEEP_FAT, around),
            Shape(Tissue.BOWEL_WALL, outer),
            Shape(loop.contents, inner),
            Shape(Tissue.BOWEL_GAS, front_part(inner, loop.gas)),
        ]
    return strokes


def _mesorectum(anatomy: Anatomy, z: float) -> list[Shape]:
    """The rectum's fat with small vessels and nodes, and the sling of the pelvic floor."""
    centre, radius = rectum_centre(anatomy, z), anatomy.rectum.size(z)
    reach = radius * anatomy.rectum.stretch + anatomy.mesorectum
    strokes = [Shape(Tissue.DEEP_FAT, ring(centre, reach, wobble=anatomy.uneven(30, z)))]
    if z < 4:
        sling = ring(centre + (0, 1), reach + 1)
        rear = sling[(sling[:, 1] > centre[1] - 6)]
        rear = rear[np.argsort(np.arctan2(rear[:, 0] - centre[0], rear[:, 1] - centre[1]))]
        strokes.append(Shape(Tissue.MUSCLE, rear, 3.5, closed=False))
    for number in range(7):
        drift = anatomy.jitter[50 + number]
        angle = np.pi * (drift[0] + 0.2 * np.sin(z / 20 + number))
        place = centre + (reach - 2) * (np.cos(angle), np.sin(angle))
        size = 1.2 + 1.4 * abs(drift[1])
        strokes.append(Shape(Tissue.VESSEL, ring(place, (size, size))))
    return strokes
