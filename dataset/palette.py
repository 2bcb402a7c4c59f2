"""Colours of classes, which differ clearly both as outlines and blended with an image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

BACKGROUND = "#000000"
PALETTE = (  # the first ones differ most; see tests/evaluation/test_palette.py
    *("#ff2000", "#20ff00", "#40bfff", "#0000ff", "#606000", "#ff80ff", "#ffdf9f", "#ffbfbf"),
    *("#00ffdf", "#009f40", "#606080", "#804000", "#ff0080", "#6080ff", "#009f9f", "#9f0020"),
    *("#bfbfff", "#206040", "#9fbf9f", "#802080", "#006080", "#bf20ff", "#ff9f60", "#bf9f00"),
)
LEAST_DIFFERENCE = 15  # CIEDE2000 between two recorded colours, else the palette takes their place
D65 = np.array([0.95047, 1.0, 1.08883])
RGB_TO_XYZ = np.array([  # of linear sRGB
    [0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip


def class_colors(recorded: Sequence[str | None] | None, num_classes: int) -> list[str]:
    """A colour per class, #rrggbb, background first.

    recorded: colours from an index, None where it has none. They are used as long as they differ;
    where two look alike, all classes take the palette's. After 24 classes the palette repeats.
    """
    own = [BACKGROUND] + [PALETTE[k % len(PALETTE)] for k in range(num_classes - 1)]
    given = [*(recorded or [])][:num_classes]
    given += [None] * (num_classes - len(given))
    colors = [color or default for color, default in zip(given, own, strict=True)]
    alike = any(
        color_difference(a, b) < LEAST_DIFFERENCE for a, b in combinations(set(colors[1:]), 2)
    )
    repeated = len(set(colors[1:])) < min(num_classes - 1, len(PALETTE))
    return own if alike or repeated else colors


def color_difference(first: str | np.ndarray, second: str | np.ndarray) -> float:
    """CIEDE2000 distance of two sRGB colours, #rrggbb or three numbers in [0, 1].

    Source: Sharma, Wu and Dalal 2005, The CIEDE2000 color-difference formula.
    """
    return lab_difference(*(_lab(_rgb(color)) for color in (first, second)))


def lab_difference(first: np.ndarray, second: np.ndarray) -> float:
    """CIEDE2000 distance of two CIELAB colours (L, a, b)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1 + 0.5 * (1 - np.sqrt(mean**7 / (mean**7 + 25.0**7)))
    chroma = np.hypot([a1 * stretch, a2 * stretch], [b1, b2])
    hue = np.degrees(np.arctan2([b1, b2], [a1 * stretch, a2 * stretch])) % 360
    turn = (hue[1] - hue[0] + 180) % 360 - 180 if chroma.all() else 0.0
    middle = hue[0] + turn / 2 if chroma.all() else hue.sum()
    lightness, mean = (l1 + l2) / 2, chroma.mean()
    cosines = np.cos(np.radians([middle - 30, 2 * middle, 3 * middle + 6, 4 * middle - 63]))
    weight = 1 + np.dot([-0.17, 0.24, 0.32, -0.2], cosines)
    parts = np.array([
        (l2 - l1) / (1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)),
        (chroma[1] - chroma[0]) / (1 + 0.045 * mean),
        2 * np.sqrt(chroma.prod()) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * mean * weight),
    ])  # fmt: skip
    angle = np.radians(60 * np.exp(-(((middle % 360 - 275) / 25) ** 2)))
    rotation = -2 * np.sqrt(mean**7 / (mean**7 + 25.0**7)) * np.sin(angle)
    return float(np.sqrt(parts @ parts + rotation * parts[1] * parts[2]))


def _rgb(color: str | np.ndarray) -> np.ndarray:
    if isinstance(color, str):
        return np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.asarray(color, float)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of an sRGB colour in [0, 1], for the white of D65."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = RGB_TO_XYZ @ linear / D65
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
