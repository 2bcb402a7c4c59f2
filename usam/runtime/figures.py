"""Pictures: overlays of segmentations on slices, box plots of scores, curves of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dataset.files import atomic_write
from dataset.text import printable

OPACITY = 0.45


def blend(image: np.ndarray, mask: np.ndarray, colors: Sequence[str]) -> np.ndarray:
    """The image with every class but the first tinted in its colour and outlined.

    image (H, W) uint8 or float in [0, 1]; mask (H, W) integer; colors: one per class, matplotlib
    names or #rrggbb. Returns (H, W, 3) float in [0, 1].
    """
    gray = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    picture = np.repeat(gray[..., None], 3, axis=-1)
    palette = np.array([to_rgb(color) for color in colors], np.float32)
    tinted = (1 - OPACITY) * picture + OPACITY * palette[mask]
    picture = np.where((mask > 0)[..., None], tinted, picture)
    edge = _borders(mask)
    picture[edge] = palette[mask[edge]]
    return picture


def _borders(mask: np.ndarray) -> np.ndarray:
    """Pixels of a class next to another class or the background; bool (H, W)."""
    around = np.pad(mask, 1, mode="edge")
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    return (mask > 0) & np.any([other != mask for other in neighbours], axis=0)


def save_overlay(
    path: Path | BinaryIO,
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    *,
    classes: Sequence[str],
    colors: Sequence[str],
    title: str = "",
    points: tuple[np.ndarray, np.ndarray] | None = None,
    box: np.ndarray | None = None,
    transpose: bool = False,
) -> None:
    """One slice as a PNG: the image alone, then one panel for each entry of `masks`.

    image (H, W); masks: panel title -> (H, W) integer labels; points: (P, 2) pixel (x, y) and
    (P,) labels, of which 1 is drawn; box (x1, y1, x2, y2). `transpose` swaps the axes of it all,
    for data stored on its side.
    """
    if transpose:
        image, masks = image.T, {name: mask.T for name, mask in masks.items()}
        points = None if points is None else (points[0][:, ::-1], points[1])
        box = None if box is None else box[[1, 0, 3, 2]]
    figure = Figure(figsize=(4 * (len(masks) + 1), 4.6), layout="constrained")
    axes = figure.subplots(1, len(masks) + 1, squeeze=False)[0]
    axes[0].imshow(image, cmap="gray")
    axes[0].set_title("image", fontsize=10)
    _draw_prompts(axes[0], points, box)
    for axis, (name, mask) in zip(axes[1:], masks.items(), strict=True):
        axis.imshow(blend(image, mask, colors))
        axis.set_title(name, fontsize=10, parse_math=False)
    for axis in axes:
        axis.set_axis_off()
    handles = [
        Patch(color=color, label=printable(name))
        for label, (name, color) in enumerate(zip(classes, colors, strict=True))
        if label and (len(classes) <= 4 or any((mask == label).any() for mask in masks.values()))
    ]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    for text in [*legend.get_texts(), figure.suptitle(printable(title), fontsize=10)]:
        text.set_parse_math(False)  # names are drawn literally
    save_figure(figure, path, dpi=110)


def _draw_prompts(
    axis: Axes, points: tuple[np.ndarray, np.ndarray] | None, box: np.ndarray | None
) -> None:
    """Mark the given points and outline the box on a panel."""
    if points is not None:
        coords, labels = points
        shown = coords[labels == 1]
        axis.plot(shown[:, 0], shown[:, 1], "o", color="lime", ms=5, markeredgecolor="black")
    if box is not None:
        x1, y1, x2, y2 = box
        outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="yellow")
        axis.add_patch(outline)


def draw_box_plots(
    path: Path, values: Mapping[str, Mapping[str, Sequence[float]]], colors: Mapping[str, str]
) -> None:
    """A panel for each metric as one PNG: one box per class, one point per case.

    values: panel title -> class name -> values, the same classes in all; colors by class name.
    """
    names = list(next(iter(values.values())))
    columns = min(3, len(values))
    lines = -(-len(values) // columns)
    size = (4.2 * columns, (1.0 + 0.42 * len(names)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for axis in axes[len(values) :]:
        axis.set_visible(False)
    for axis, (title, by_class) in zip(axes, values.items(), strict=False):
        for place, name in enumerate(names):
            _draw_box(axis, place, np.array(by_class[name]), colors[name])
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.set_yticks(range(len(names)), [printable(name) for name in names], parse_math=False)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path, dpi=120)


def _draw_box(axis: Axes, place: int, values: np.ndarray, color: str) -> None:
    """A horizontal box and its points, spread a little so that equal values stay visible."""
    if not len(values):
        return
    parts = axis.boxplot(
        values, positions=[place], orientation="horizontal", widths=0.55, showfliers=False,
        patch_artist=True, manage_ticks=False, medianprops={"color": "black", "linewidth": 1.6},
    )  # fmt: skip
    parts["boxes"][0].set(facecolor=(*to_rgb(color), 0.25), edgecolor=color)
    spread = np.random.default_rng(place).uniform(-0.18, 0.18, len(values))
    axis.plot(values, place + spread, "o", color=color, markersize=2.8, alpha=0.75)


def draw_run_curves(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Loss and validation Dice over the epochs of a run as PNG.

    lines: one per epoch, as in log.jsonl: epoch, loss, and val with dice (by name) and
    mean_dice, where there was a validation. What is None leaves a gap.
    """
    scored = [line for line in lines if line.get("val")]
    figure = Figure(figsize=(6.4 if not scored else 12, 4), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    _draw_curve(axes[0], lines, [line["loss"] for line in lines], color="#1f77b4")
    axes[0].set(title="training loss", xlabel="epoch")
    if scored:
        names = [name for name in scored[0]["val"]["dice"] if name != "background"]
        tab20 = matplotlib.colormaps["tab20"].colors
        axes[1].set_prop_cycle(color=(*tab20[0::2], *tab20[1::2]))
        for name in names:
            dice = [line["val"]["dice"][name] for line in scored]
            _draw_curve(axes[1], scored, dice, label=printable(name))
        means = [line["val"]["mean_dice"] for line in scored]
        _draw_curve(axes[1], scored, means, label="mean", color="black", linewidth=2)
        axes[1].set(title="validation Dice", xlabel="epoch", ylim=(0, 1))
        legend = axes[1].legend(fontsize=8, ncols=1 + len(names) // 10)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names are drawn literally
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=100)


def _draw_curve(
    axis: Axes, lines: Sequence[Mapping[str, Any]], values: Sequence[float | None], **how: Any
) -> None:
    known = [math.nan if value is None else value for value in values]
    mark = "o" if len(lines) < 30 else None
    axis.plot([line["epoch"] for line in lines], known, marker=mark, markersize=3, **how)


def save_figure(figure: Figure, path: Path | BinaryIO, *, dpi: int) -> None:
    """Saves a picture to a stream, or atomically to a file."""
    if not isinstance(path, Path):
        figure.savefig(path, dpi=dpi)
        return
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=dpi)
