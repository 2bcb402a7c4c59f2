"""Pictures of clicked objects in a volume: axial slices and two other planes through the clicks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from dataset.palette import class_colors
from dataset.scans.volumes import ScanVolume
from dataset.scans.window import apply_window, window_limits
from usam.prediction.overlay import Panel, save_montage, spread_slices
from usam.prediction.volume_prompts import MarkedObject

MOST_OBJECTS = 3  # that get a coronal and a sagittal plane
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis that runs through their slices


def draw_objects(
    path: Path,
    scan: ScanVolume,
    label: np.ndarray,
    objects: Sequence[MarkedObject],
    *,
    title: str,
) -> None:
    """One PNG: axial slices with clicks or foreground, then two planes through each object.

    label (X, Y, Z). Slices are upright, seen from below and from the front, at 1.5 mm; their
    numbers are the scan file's own.
    """
    clicks = [click for one in objects for click in one.box_and_clicks]
    boxes = [one.box for one in objects if one.box]
    low, high = window_limits(scan.image.T, "percentile")
    limits = (low, max(high, low + 1))
    foreground = np.count_nonzero(label, axis=(0, 1))
    axial = spread_slices(foreground, wanted=sorted({voxel[2] for voxel, _ in clicks}))
    wanted = [("axial", k) for k in axial]
    for voxel in _middles(objects, label):
        wanted += [("coronal", voxel[1]), ("sagittal", voxel[0])]
    panels = []
    for plane, index in dict.fromkeys(wanted):
        image = apply_window(upright(scan.image, plane, index)[None], limits)[0]
        points = [
            (*_pixel(voxel, plane, label.shape), sign)
            for voxel, sign in clicks
            if voxel[PLANES[plane]] == index
        ]
        panels.append(
            Panel(f"{plane} {file_index(scan, plane, index)}", image, upright(label, plane, index),
                  points=tuple(points), boxes=tuple(_boxes(boxes, plane, index, label.shape)))
        )  # fmt: skip
    names = {one.label: one.name for one in objects}
    classes = [names.get(number, "") for number in range(max(names) + 1)]
    colors = class_colors(None, len(classes))
    save_montage(path, panels, classes=classes, colors=colors, title=title)


def upright(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """One slice of a RAS volume (X, Y, Z) as it is displayed, (H, W); a view.

    Axial: rows to posterior, columns to the patient's left. Coronal: rows to the feet, columns to
    the left. Sagittal: rows to the feet, columns to posterior.
    """
    return volume[::-1, ::-1, ::-1].take(-1 - index, axis=PLANES[plane]).T


def _pixel(voxel: Sequence[int], plane: str, shape: Sequence[int]) -> tuple[float, float]:
    """Where `upright` puts a voxel: (x, y) = (column, row)."""
    place = [size - 1 - index for index, size in zip(voxel, shape, strict=True)]
    column, row = [place[axis] for axis in range(3) if axis != PLANES[plane]]
    return column, row


def _boxes(
    boxes: Sequence[tuple], plane: str, index: int, shape: Sequence[int]
) -> Iterator[tuple[float, ...]]:
    """The sides (x1, y1, x2, y2) of the boxes that a slice cuts."""
    for low, high in boxes:
        if low[PLANES[plane]] <= index <= high[PLANES[plane]]:
            (x2, y2), (x1, y1) = _pixel(low, plane, shape), _pixel(high, plane, shape)
            yield x1, y1, x2, y2


def _middles(objects: Sequence[MarkedObject], label: np.ndarray) -> list[tuple[int, ...]]:
    """A voxel in each of the first few objects: its first click, or a predicted voxel."""
    middles = []
    for one in objects[:MOST_OBJECTS]:
        inside = [voxel for voxel, sign in one.box_and_clicks if sign == 1]
        found = np.argwhere(label == one.label) if not inside else ()
        if inside:
            middles.append(inside[0])
        elif len(found):
            middles.append(tuple(found[len(found) // 2].tolist()))
    return middles


def file_index(scan: ScanVolume, plane: str, index: int) -> int:
    """The index in the scan's file, along its own axis, of a slice of the volume."""
    header, axis = scan.grid.header, PLANES[plane]
    voxel = np.zeros(3)
    voxel[axis] = index
    stored = int(np.argmax(nib.io_orientation(header.affine)[:, 0] == axis))
    place = np.linalg.inv(header.affine) @ scan.affine @ np.append(voxel, 1)
    return int(np.clip(np.rint(place[stored]), 0, header.shape[stored] - 1))
