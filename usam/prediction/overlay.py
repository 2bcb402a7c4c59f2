"""A picture of a prediction: slices with their classes tinted, and what the user marked on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from usam.runtime.figures import blend, save_figure

MONTAGE = 9  # slices
MOST_WANTED = 24  # slices with prompts that are drawn
MARKS = {1: ("o", "point in the object"), 0: ("X", "point outside")}  # by a point's label
MARK_STYLE = {"color": "white", "markeredgecolor": "black", "markersize": 7, "linestyle": "none"}


@dataclass(frozen=True)
class Panel:
    """One slice upright: image uint8 (H, W), labels (H, W), and marks in its pixels.

    aspect: height of a pixel over its width; points (x, y, label), label 1 in the object and 0
    outside; boxes (x1, y1, x2, y2), first and last pixel.
    """

    title: str
    image: np.ndarray
    labels: np.ndarray
    aspect: float = 1.0
    points: tuple[tuple[float, float, int], ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()


def spread_slices(foreground: np.ndarray, wanted: Sequence[int] = ()) -> list[int]:
    """Sorted indices of the slices to draw: those `wanted`, and others with much foreground.

    foreground: voxels per slice, (S,). Of each ninth of the slices with foreground, the one with
    most of it, unless it would look like a neighbour already chosen; without any, the middle one.
    """
    filled = np.flatnonzero(foreground)
    chosen = [int(k) for k in np.unique(_thinned(wanted, MOST_WANTED))]
    apart = max(1, len(filled) // (MONTAGE + 3))
    for part in np.array_split(filled, MONTAGE):
        free = [k for k in part if all(abs(int(k) - other) >= apart for other in chosen)]
        if free and len(chosen) < max(MONTAGE, len(wanted)):
            chosen.append(int(max(free, key=lambda k: foreground[k])))
    return sorted(chosen) or [len(foreground) // 2]


def _thinned(numbers: Sequence[int], most: int) -> np.ndarray:
    """At most `most` of the numbers, evenly spaced."""
    numbers = np.asarray(numbers, dtype=int)
    if len(numbers) <= most:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, most).round().astype(int)]


def save_montage(
    path: Path,
    panels: Sequence[Panel],
    *,
    classes: Sequence[str],
    colors: Sequence[str],
    title: str = "",
) -> None:
    """Panels side by side with a legend of the classes in them, as one PNG."""
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        axis.imshow(blend(panel.image, panel.labels, colors), aspect=panel.aspect)
        axis.set_title(panel.title, fontsize=9, parse_math=False)
        _mark(axis, panel)
    present = sorted(set().union(*(np.unique(panel.labels) for panel in panels)) - {0})
    handles = [Patch(color=colors[i], label=classes[i]) for i in present]
    handles += _mark_handles(panels)
    if handles:
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    shown = title if present else f"{title}: no foreground"
    figure.suptitle(shown, fontsize=10, parse_math=False)
    save_figure(figure, path, dpi=110)


def _mark_handles(panels: Sequence[Panel]) -> list[Line2D]:
    """The legend of the points in the panels."""
    used = sorted({label for panel in panels for *_, label in panel.points}, reverse=True)
    symbols = [MARKS[label] for label in used]
    return [Line2D([], [], marker=symbol, label=text, **MARK_STYLE) for symbol, text in symbols]


def _mark(axis: Axes, panel: Panel) -> None:
    """Draw a panel's points and boxes."""
    for x, y, label in panel.points:
        axis.plot(x, y, marker=MARKS[label][0], **MARK_STYLE)
    for x1, y1, x2, y2 in panel.boxes:
        sides = x2 - x1 + 1, y2 - y1 + 1
        outline = Rectangle((x1 - 0.5, y1 - 0.5), *sides, fill=False, edgecolor="white", ls="--")
        axis.add_patch(outline)
    height, width = panel.image.shape
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)
