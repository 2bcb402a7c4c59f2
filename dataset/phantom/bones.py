"""The bones of a drawn pelvis: hip joints, wings of the ilium, sacrum and coccyx."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataset.phantom.patient import SIDES, Anatomy
from dataset.phantom.shapes import Shape, Tissue, bezier, plate, ring

HEAD_RADIUS = 23.0  # mm, an adult's femoral head


def sacrum_size(anatomy: Anatomy, z: float) -> NDArray[np.float64]:
    """Half width and half depth (2,) mm of the sacrum or, below it, the coccyx."""
    rise = np.clip((z - 2) / 55, 0, 1)
    return np.array([8 + 44 * rise**0.8, 5.5 + 9 * rise])


def sacrum_centre(anatomy: Anatomy, z: float) -> NDArray[np.float64]:
    """Centre (2,) mm of the sacrum or coccyx: its curve is hollow towards the rectum."""
    return np.array([0.0, anatomy.sacrum_y - 0.011 * (z - 22) ** 2])


def hips(anatomy: Anatomy, z: float) -> list[Shape]:
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
    """Spongy bone with a cortex of the given thickness in mm."""
    return [Shape(Tissue.MARROW, outline), Shape(Tissue.CORTEX, outline, cortex)]


def sacrum(anatomy: Anatomy, z: float) -> list[Shape]:
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
