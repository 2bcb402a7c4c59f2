"""What a prediction leaves beside its label map: class volumes as JSON and a picture.

dataset.scans.write writes the label map and the probabilities; nothing of a patient but the
voxels' place goes into any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from dataset.files import write_json
from usam.runtime.figures import blend, save_figure

MONTAGE = 9  # slices


def keep_largest(label: np.ndarray) -> None:
    """Set all but the largest piece of every class to background, in place; label (I, J, K).

    Voxels that share a corner belong to one piece. Holds int32 numbers for the box around one
    class at a time.
    """
    touching = np.ones((3, 3, 3), dtype=bool)
    for class_id, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        inside = label[box]
        pieces, count = ndimage.label(inside == class_id, structure=touching)
        if count == 1:
            continue
        sizes = sum(np.bincount(plane.ravel(), minlength=count + 1) for plane in pieces)
        largest = 1 + int(sizes[1:].argmax())
        for plane, number in zip(inside, pieces, strict=True):
            plane[(number > 0) & (number != largest)] = 0


def count_voxels(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Voxels of every class in label (I, J, K), (num_classes,) int64."""
    planes = label.transpose(2, 1, 0)  # as they lie in memory; bincount makes eight bytes of each
    return sum(np.bincount(plane.ravel(), minlength=num_classes) for plane in planes)


def class_volumes(
    voxels: Sequence[int], classes: Sequence[str], colors: Sequence[str], voxel_ml: float | None
) -> list[dict[str, Any]]:
    """A row a class: id, name, color, voxels and volume_ml (None if a voxel's is unknown)."""
    return [
        {
            "id": number,
            "name": name,
            "color": color,
            "voxels": int(count),
            "volume_ml": None if voxel_ml is None else round(int(count) * voxel_ml, 4),
        }
        for number, (name, color, count) in enumerate(zip(classes, colors, voxels, strict=True))
    ]


def write_description(path: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` as strict JSON."""
    write_json(path, facts, 2, sort_keys=False)


def class_colors(colors: Sequence[str | None] | None, num_classes: int) -> list[str]:
    """A colour a class, #rrggbb: those recorded, matplotlib's tab20 for the others.

    Its ten strong colours come first, then their pale twins, so that few classes look unlike.
    """
    tab20 = matplotlib.colormaps["tab20"].colors
    palette = (*tab20[0::2], *tab20[1::2])
    recorded = list(colors or [])[:num_classes]
    recorded += [None] * (num_classes - len(recorded))
    defaults = ["#000000"] + [to_hex(palette[i % len(palette)]) for i in range(num_classes)]
    return [color or default for color, default in zip(recorded, defaults, strict=False)]


def montage_slices(foreground: np.ndarray) -> list[int]:
    """Of each ninth of the slices with foreground, the one with most of it; else the middle one.

    foreground: voxels a slice, (S,). Spread, since neighbours look alike.
    """
    parts = np.array_split(np.flatnonzero(foreground), MONTAGE)
    numbers = [int(part[foreground[part].argmax()]) for part in parts if len(part)]
    return numbers or [len(foreground) // 2]


def save_montage(
    path: Path,
    numbers: Sequence[int],
    plane: Callable[[int], np.ndarray],
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    colors: Sequence[str],
    aspect: float = 1.0,
    transpose: bool = False,
    title: str = "",
) -> None:
    """Slices with their classes tinted, as one PNG.

    numbers: the slices to show; plane: slice -> uint8 (H, W); labels (S, H, W); aspect: height of
    a pixel over its width. `transpose` turns slices upright that are stored on their side.
    """
    columns = math.ceil(math.sqrt(len(numbers)))
    rows = math.ceil(len(numbers) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, k in zip(axes, numbers, strict=False):
        image, mask = plane(k), labels[k]
        if transpose:
            image, mask = image.T, mask.T
        axis.imshow(blend(image, mask, colors), aspect=aspect)
        axis.set_title(f"slice {k}", fontsize=9)
    shown = np.unique(labels[list(numbers)])
    handles = [Patch(color=colors[i], label=classes[i]) for i in shown if i]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False
        )
    figure.suptitle(title if handles else f"{title}: no foreground", fontsize=10)
    save_figure(figure, path, dpi=110)
