"""Segments scans with SAM's own weights, without training, from boxes and points.

A 3D box, or boxes on two slices, segments all slices between: the object found on one slice gives
the box on the next.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset.palette import class_colors
from dataset.scans.header import Scan
from dataset.scans.read import read_scan
from dataset.scans.slices import ScanSlices
from dataset.scans.window import parse_window
from dataset.text import counted
from usam.models.sam import Sam
from usam.prediction.overlay import Panel, save_montage, spread_slices
from usam.prediction.results import Segmentation, count_voxels, measured, measured_text
from usam.prediction.slice_objects import Box, SliceObject, objects_of
from usam.prediction.slices import keep_largest
from usam.runtime.precision import Precision
from usam.runtime.processes import is_main, say
from usam.weights.pretrained import load_pretrained

GROWTH = 1 / 64  # of the slice's longer side: how far an object may grow from slice to slice
AIR = -300.0  # HU; only CT has values below
CACHED = 128  # embeddings of slices, 4 MiB each


class PretrainedModel:
    """SAM with its own weights, which segments the objects that a user marks on slices.

    Raises what load_pretrained raises.
    """

    def __init__(self, args: Namespace, precision: Precision, saved: None = None) -> None:
        model, facts = load_pretrained(args.sam_model, args.sam_weight, args.sam_preprocess)
        self.model, self.precision = model.to(precision.device), precision
        self.facts = {
            "checkpoint": facts["checkpoint"], "model": facts["weights"],
            "preparation": facts["input"],
        }  # fmt: skip
        say(f"{facts['checkpoint']}: {facts['weights']}, input of {facts['input']}")

    def segment(
        self,
        stored: Scan,
        args: Namespace,
        contents: Mapping[Path, Any] | None,
        probability_file: None = None,
    ) -> Segmentation:
        """The objects that are marked in a scan (`objects_of`); it has no probabilities."""
        scan = open_scan(stored, args)
        objects = objects_of(args, contents, scan)
        start = time.monotonic()
        segmenter = SliceSegmenter(self.model, scan, self.precision)
        label, empty = segment_objects(segmenter, objects)
        if args.largest_component:
            keep_largest(label)
        seconds = (time.monotonic() - start) / max(segmenter.num_encoded, 1)
        last = f"\n  window {window_text(scan)}, {seconds:.1f} s per slice"
        return found_in(scan, label, objects, self.facts, empty=empty, last=last)


def open_scan(scan: Scan | Path, args: Namespace) -> ScanSlices:
    """The scan with the window of --window, else the abdominal one for CT, percentiles for others.

    A scan is taken for CT if it has values of air.
    """
    data = {"orientation": "LPS", "img_size": 0, "window": "percentile"}
    if isinstance(scan, Path):
        scan = read_scan(scan, args.channel, args.series)
    if args.window:
        return ScanSlices(scan, data, window=parse_window(args.window))
    slices = ScanSlices(scan, data)
    if scan.header.format == "npz" or float(scan.array.min()) > AIR:
        return slices
    return ScanSlices(scan, data, window=parse_window(["abdomen"]))


def window_text(scan: ScanSlices) -> str:
    """The window as text: -160 to 240, or percentile."""
    if isinstance(scan.window, tuple):
        return f"{scan.window[0]:g} to {scan.window[1]:g}"
    return str(scan.window)


class SliceSegmenter:
    """A SAM on the slices of one scan; each slice is encoded once, `num_encoded` in all."""

    def __init__(self, model: Sam, scan: ScanSlices, precision: Precision) -> None:
        self.model, self.scan, self.precision = model, scan, precision
        height, width = scan.shape[1:]
        self.scale = model.img_size / max(height, width)
        self.size = round(height * self.scale), round(width * self.scale)  # in the model's input
        self.num_encoded = 0
        self._embeddings: dict[int, Tensor] = {}

    def logits(
        self, k: int, box: Box | None = None, points: Sequence[tuple[float, float, int]] = ()
    ) -> np.ndarray:
        """Logits (H, W) float32 of the object that a box and points mark on slice k.

        box (x1, y1, x2, y2) and points (x, y, label) in pixels of the slice.
        """
        device, given = self.precision.device, None
        if points:
            table = torch.tensor([point[:2] for point in points], device=device)
            labels = torch.tensor([point[2] for point in points], device=device)
            given = ((table + 0.5) * self.scale - 0.5, labels)
        corners = None if box is None else torch.tensor(box, device=device) * self.scale
        found, _ = self.model.segment(self._embedding(k), points=given, box=corners)
        rows, columns = self.size
        inside = found[None, None, :rows, :columns]
        native = F.interpolate(inside, self.scan.shape[1:], mode="bilinear", align_corners=False)
        return native[0, 0].cpu().numpy()

    def _embedding(self, k: int) -> Tensor:
        if k not in self._embeddings:
            if len(self._embeddings) == CACHED:
                del self._embeddings[next(iter(self._embeddings))]
            image = torch.from_numpy(self._input(k)).to(self.precision.device)
            with self.precision.autocast():
                self._embeddings[k] = self.model.embed(image[None, None], self.size).float()
            self.num_encoded += 1
        return self._embeddings[k]

    def _input(self, k: int) -> np.ndarray:
        """Slice k at the top left of a square (S, S), its longest side S, float32 in [0, 1].

        For weights on the scale 0 to 1 its darkest pixel is 0 and its brightest 1, as in MedSAM.
        """
        plane, (rows, columns) = self.scan.plane(k), self.size
        way = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR
        plane = cv2.resize(plane.astype(np.float32), (columns, rows), interpolation=way) / 255
        if self.model.preparation.name == "minmax":
            low, high = float(plane.min()), float(plane.max())
            plane = (plane - low) / max(high - low, 1e-8)
        square = np.zeros((self.model.img_size, self.model.img_size), dtype=np.float32)
        square[:rows, :columns] = plane
        return square


def segment_objects(
    segmenter: SliceSegmenter, objects: Sequence[SliceObject]
) -> tuple[np.ndarray, list[str]]:
    """The label map in the scan's own axes, uint8, and the names of objects without a pixel.

    Where objects overlap the higher logit decides.
    """
    scan = segmenter.scan
    label = np.zeros(scan.header.shape, dtype=np.uint8, order="F")
    slices = scan.canonical(label)  # (S, H, W), a view
    best: dict[int, np.ndarray] = {}
    empty = []
    total = sum(len(one.slices) for one in objects)
    with tqdm(total=total, unit="slice", leave=False, disable=not is_main()) as bar:
        for one in objects:
            found = False
            bar.set_description(one.name)
            for k, logits in object_logits(segmenter, one):
                wins = logits > best.get(k, 0.0)
                best[k] = np.maximum(logits, best.get(k, 0.0))
                slices[k][wins] = one.label
                found = found or bool(wins.any())
                bar.update()
            empty += [] if found else [one.name]
    return label, empty


def object_logits(segmenter: SliceSegmenter, one: SliceObject) -> Iterator[tuple[int, np.ndarray]]:
    """An object's logits (H, W) slice by slice, each with its number.

    From every marked slice the object is followed to its neighbours within its span: the next
    box is that of what was found, grown by GROWTH, within the object's limit.
    """
    grow = GROWTH * max(segmenter.scan.shape[1:])
    for seed, chains in one.chains():
        box, points = one.boxes.get(seed, one.limit), one.points.get(seed, ())
        start = segmenter.logits(seed, box, points)
        yield seed, limited(start, one.limit)
        for chain in chains:
            before = box_of(start > 0) or box
            for k in chain:
                if before is None:
                    break
                logits = limited(
                    segmenter.logits(k, grown(before, grow, one, segmenter)), one.limit
                )
                yield k, logits
                before = box_of(logits > 0) or before


def box_of(mask: np.ndarray) -> Box | None:
    """First and last column and row of a mask (H, W) as (x1, y1, x2, y2); None for an empty one."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def grown(box: Box, pixels: float, one: SliceObject, segmenter: SliceSegmenter) -> Box:
    """A box with each side moved outwards, within the object's limit and the slice."""
    height, width = segmenter.scan.shape[1:]
    x1, y1, x2, y2 = one.limit or (0.0, 0.0, width - 1.0, height - 1.0)
    return (max(box[0] - pixels, x1), max(box[1] - pixels, y1),
            min(box[2] + pixels, x2), min(box[3] + pixels, y2))  # fmt: skip


def limited(logits: np.ndarray, limit: Box | None) -> np.ndarray:
    """Logits (H, W), at most 0 outside a box."""
    if limit is None:
        return logits
    x1, y1, x2, y2 = (round(side) for side in limit)
    outside = np.ones(logits.shape, dtype=bool)
    outside[y1 : y2 + 1, x1 : x2 + 1] = False
    return np.where(outside, np.minimum(logits, -1.0), logits)


# ------------------------------------------------------------------ results


def found_in(
    scan: ScanSlices,
    label: np.ndarray,
    objects: Sequence[SliceObject],
    facts: Mapping[str, str],
    *,
    empty: Sequence[str],
    last: str,
) -> Segmentation:
    """The result for a label map, with the names of `empty` objects and a `last` line of text."""
    voxels, header, window = count_voxels(label, 256).tolist(), scan.header, scan.window
    rows = [
        {"name": one.name, "label": one.label, "slices": len(one.slices)}
        | measured(voxels[one.label], header.voxel_ml)
        for one in objects
    ]
    found = ", ".join(f"{measured_text(row)} on {counted(row['slices'], 'slice')}" for row in rows)
    about = {
        "input": header.path.name,
        "shape": list(header.shape),
        "window": list(window) if isinstance(window, tuple) else window,
        **facts,
    }

    def picture(path: Path, title: str) -> None:
        draw(path, scan, scan.canonical(label), objects, title)

    warnings = [*header.remarks, *(f"{name}: nothing found" for name in empty)]
    return Segmentation(label, header, "objects", rows, about, warnings, f"{found}{last}", picture)


def draw(
    path: Path, scan: ScanSlices, slices: np.ndarray, objects: Sequence[SliceObject], title: str
) -> None:
    """A montage of slices with the objects and what the user marked on them."""
    names = {one.label: one.name for one in objects}
    classes = [names.get(number, "") for number in range(max(names) + 1)]
    marked = sorted({k for one in objects for k in (*one.boxes, *one.points)})
    foreground = np.array([np.count_nonzero(plane) for plane in slices])
    panels = [
        Panel(
            f"slice {k}", scan.plane(k), slices[k], aspect=scan.pixel_aspect,
            points=tuple(p for one in objects for p in one.points.get(k, ())),
            boxes=tuple(one.boxes[k] for one in objects if k in one.boxes),
        )
        for k in spread_slices(foreground, wanted=marked)
    ]  # fmt: skip
    colors = class_colors(None, len(classes))
    save_montage(path, panels, classes=classes, colors=colors, title=title)
