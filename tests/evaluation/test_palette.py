"""Colours of classes: CIEDE2000 by published values, and the palette's distances."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from dataset.palette import PALETTE, class_colors, color_difference, lab_difference
from usam.runtime.figures import blend

AS_OUTLINES, BLENDED = 15, 8  # smallest CIEDE2000 distance of any two classes
GRAYS = (40, 128, 220)


def smallest_distances(colors: list[str]) -> tuple[float, float]:
    """Of any two classes as outlines, and inside, blended with each of GRAYS."""
    classes = range(1, len(colors))
    outlines = min(color_difference(colors[a], colors[b]) for a, b in combinations(classes, 2))
    inside = []
    for gray in GRAYS:
        image, mask = np.full((3, 3), gray, np.uint8), np.ones((3, 3), int)
        shown = [blend(image, label * mask, colors)[1, 1] for label in range(len(colors))]
        inside += [color_difference(*pair) for pair in combinations(shown, 2)]
    return outlines, min(inside)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [  # Sharma et al. 2005, table 1
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((50, 2.5, 0), (61, -5, 29), 22.8977),
        ((50, 2.5, 0), (56, -27, -3), 31.9030),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ],
)
def test_color_difference_equals_published_values(
    first: tuple[float, ...], second: tuple[float, ...], wanted: float
) -> None:
    assert lab_difference(np.array(first), np.array(second)) == pytest.approx(wanted, abs=1e-4)
    assert lab_difference(np.array(second), np.array(first)) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("num_classes", [2, 4, 12, 16, 24])
def test_classes_differ_as_outlines_and_blended(num_classes: int) -> None:
    """From each other, and inside from the gray image as well."""
    outlines, inside = smallest_distances(class_colors(None, num_classes + 1))
    assert outlines >= AS_OUTLINES if num_classes > 1 else True
    assert inside >= BLENDED


def test_any_twelve_classes_of_the_palette_differ() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        chosen = ["#000000", *rng.choice(PALETTE, 12, replace=False)]
        outlines, inside = smallest_distances(chosen)
        assert outlines >= AS_OUTLINES
        assert inside >= BLENDED


def test_recorded_colors_are_used_unless_they_look_alike() -> None:
    care = ["#000000", "#2ca02c", "#d62728"]
    assert class_colors(care, 3) == care
    assert class_colors(["#000000", None, "#d62728"], 3) == ["#000000", PALETTE[0], PALETTE[1]]
    earlier = ["#ff7f00", "#d95f02", "#f0e442", "#66a61e"]  # orange twice
    assert class_colors(["#000000", *earlier], 5) == ["#000000", *PALETTE[:4]]
    assert class_colors(["#000000", "#00ff00", "#00ff00"], 3) == ["#000000", *PALETTE[:2]]
    assert len(class_colors(None, 41)) == 41
