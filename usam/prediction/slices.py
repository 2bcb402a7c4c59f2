"""U-SAM on scans: predicts slices in batches, for label maps in the scan's own geometry.

Neither logits nor floats of a whole volume are ever held.
"""

from __future__ import annotations

from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from dataset.palette import class_colors
from dataset.scans.header import Scan
from dataset.scans.slices import ScanSlices
from dataset.scans.window import parse_window, window_misfit
from dataset.scans.write import STEPS, ProbabilityArray, ProbabilityFile
from usam.prediction.overlay import Panel, save_montage, spread_slices
from usam.prediction.prompts import ScanPrompts, slice_prompts_of
from usam.prediction.results import Segmentation, count_voxels, measured, measured_text
from usam.prediction.slice_prompts import SlicePrompts, marks_on_slices, slice_prompts
from usam.runtime.precision import Precision
from usam.runtime.processes import is_main
from usam.weights.inference import answers_text, load_for_inference

BATCHES_AHEAD = 2  # prepared while the device works
PREPARED = ("orientation", "spacing", "img_size", "clahe", "crop", "body_crop")  # of data


class SliceModel:
    """U-SAM of a checkpoint, or the average of several, that segments scans slice by slice.

    Raises what load_for_inference raises.
    """

    def __init__(self, args: Namespace, precision: Precision, saved: dict[str, Any]) -> None:
        model, row_col = load_for_inference(args, precision.device, saved)
        self.predictor = Predictor(
            model.eval(), precision, saved["data"], prompt_mode=args.prompt_mode,
            points_are_row_col=row_col, batch_size=args.batch_size, threads=args.num_workers,
        )  # fmt: skip
        self.facts = answers_text(args) | {"model": f"u-sam {args.sam_model}"}

    def slices_of(self, scan: Scan, args: Namespace) -> ScanSlices:
        """A scan as the model was trained, with the window of --window."""
        window = parse_window(args.window) if args.window else None
        return ScanSlices(scan, self.predictor.data, window=window)

    def segment(
        self,
        scan: Scan,
        args: Namespace,
        contents: Mapping[Path, Any] | None,
        probability_file: Path | None = None,
    ) -> Segmentation:
        """What the model finds in a scan with its prompts (`slice_prompts_of`).

        probability_file: where --probabilities go; without one they are kept in memory.
        """
        predictor = replace(
            self.predictor, probabilities=args.probabilities,
            largest_component=args.largest_component,
        )  # fmt: skip
        prompts = slice_prompts_of(args, contents, scan.path)
        return segment_scan(
            self.slices_of(scan, args), predictor, prompts=prompts, facts=self.facts,
            probability_file=probability_file,
        )  # fmt: skip


@dataclass(frozen=True)
class Predictor:
    """How every scan of a run is segmented.

    model: maps (N, C, H, W) in [0, 1] to logits (N, num_classes, H, W). data: a checkpoint's
    (classes, colors, orientation, ...). threads prepare slices beside the device.
    """

    model: nn.Module
    precision: Precision
    data: Mapping[str, Any]
    prompt_mode: int | str = 0
    points_are_row_col: bool = False
    batch_size: int = 24
    threads: int = 1
    probabilities: bool = False
    largest_component: bool = False

    @property
    def classes(self) -> list[str]:
        """Class names by label id."""
        return list(self.data["classes"])

    @property
    def colors(self) -> list[str]:
        """Class colours by label id."""
        return class_colors(self.data.get("colors"), len(self.classes))


def segment_scan(
    scan: ScanSlices,
    predictor: Predictor,
    *,
    prompts: ScanPrompts,
    facts: Mapping[str, Any],
    probability_file: Path | None = None,
) -> Segmentation:
    """The classes of a scan, described with `facts`; probabilities as for `SliceModel.segment`.

    Raises ValueError where the prompts do not fit the model or the scan.
    """
    given = slice_prompts(prompts, predictor.prompt_mode, scan)
    label = np.zeros(scan.header.shape, dtype=np.uint8, order="F")
    number, in_memory, sink = len(predictor.classes), None, nullcontext()
    if predictor.probabilities and probability_file:
        sink = ProbabilityFile(probability_file, number, scan.header)
    elif predictor.probabilities:
        sink = in_memory = ProbabilityArray(number, scan.header)
    warnings = [*scan.header.remarks, *intensity_warnings(scan)]
    with sink as opened:
        _segment(scan, predictor, given, scan.canonical(label), opened)
    if predictor.largest_component:
        keep_largest(label)
    rows = class_rows(label, predictor, scan.header.voxel_ml)
    return Segmentation(
        label, scan.header, "classes", rows, describe(scan, given, predictor) | dict(facts),
        warnings, one_line(rows), partial(_draw, scan, scan.canonical(label), predictor, prompts),
        in_memory, (probability_file,) if isinstance(sink, ProbabilityFile) else (),
    )  # fmt: skip


def intensity_warnings(scan: ScanSlices) -> list[str]:
    """A line if the scan's values do not suit the window that the model was trained with."""
    misfit = window_misfit(scan.volume.slices, scan.window)
    if not misfit or scan.scan.is_constant:
        return [f"{misfit}; nothing to segment"] if misfit else []
    return [f"{misfit}; give --window LOW HIGH in the scan's units, or --window percentile if the "
            "model was trained with it"]  # fmt: skip


def class_rows(
    label: np.ndarray, predictor: Predictor, voxel_ml: float | None
) -> list[dict[str, Any]]:
    """A row per class: id, name, color, voxels and volume_ml."""
    voxels = count_voxels(label, len(predictor.classes)).tolist()
    named = zip(predictor.classes, predictor.colors, voxels, strict=True)
    return [
        {"id": number, "name": name, "color": color, **measured(count, voxel_ml)}
        for number, (name, color, count) in enumerate(named)
    ]


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
        counts = sum(np.bincount(plane.ravel(), minlength=count + 1) for plane in pieces)
        largest = 1 + int(counts[1:].argmax())
        for plane, number in zip(inside, pieces, strict=True):
            plane[(number > 0) & (number != largest)] = 0


def describe(scan: ScanSlices, given: SlicePrompts | None, predictor: Predictor) -> dict[str, Any]:
    """The description's entries about a scan; its file name, never its folder."""
    header = scan.header
    numbers = slice_numbers(scan)
    return {
        "input": header.path.name,
        "input_mode": predictor.data.get("input", "2d"),
        "shape": list(header.shape),
        "spacing_mm": None if header.spacing is None else [round(s, 6) for s in header.spacing],
        "window": list(scan.window) if isinstance(scan.window, tuple) else scan.window,
        **{name: predictor.data.get(name) for name in PREPARED},
        "prompted_slices": None if given is None else sorted(numbers[k] for k in given.slices),
        "largest_component": predictor.largest_component,
    }


def slice_numbers(scan: ScanSlices) -> list[int]:
    """The index in the file, along its own axis, of each of the scan's slices."""
    first, *_ = scan.locate(np.zeros((1, 3)))
    backwards = round(float(first[0])) != 0
    return list(range(len(scan)))[:: -1 if backwards else 1]


def one_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """The classes found, with their volumes, for the terminal."""
    found = [measured_text(row) for row in rows[1:] if row["voxels"]]
    return ", ".join(found) or "no foreground"


def _segment(
    scan: ScanSlices,
    predictor: Predictor,
    given: SlicePrompts | None,
    labels: np.ndarray,
    probabilities: ProbabilityFile | ProbabilityArray | None,
) -> None:
    """Fill labels (S, H, W), zero before, slice by slice; a slice without a prompt stays zero."""
    numbers = list(range(len(scan))) if given is None else given.slices
    if scan.scan.is_constant:
        numbers = []
    size = labels.shape[1:]
    if probabilities is not None and len(numbers) < len(scan):
        _write_background(scan, probabilities, sorted(set(range(len(scan))) - set(numbers)))
    name = scan.header.path.name
    with tqdm(
        total=len(numbers), desc=name, unit="slice", leave=False, disable=not is_main()
    ) as bar:
        for chunk, images in prepared(scan, numbers, predictor.batch_size, predictor.threads):
            logits = slice_logits(predictor, images, chunk, given)
            check_finite(logits, chunk, scan)
            for k, one in zip(chunk, logits, strict=True):
                native = to_native(one[None], scan.box, size)
                labels[k] = native.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
                if probabilities is not None:
                    steps = (native.softmax(dim=1) * STEPS).round().int().cpu().numpy()
                    probabilities.write([k], steps.astype(np.uint16), scan.canonical)
            bar.update(len(chunk))


def check_finite(logits: Tensor, numbers: Sequence[int], scan: ScanSlices) -> None:
    """Raises ValueError naming the first slice whose logits are NaN or infinite."""
    finite = logits.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        number = slice_numbers(scan)[numbers[int(finite.int().argmin())]]
        raise ValueError(
            f"{scan.header.path}: the model's output is not finite in slice {number}; check the "
            "checkpoint, or use --amp off"
        )


def prepared(
    scan: ScanSlices, numbers: Sequence[int], batch_size: int, threads: int
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Slices in batches: their numbers and images, uint8 (n, C, size, size).

    Threads prepare up to BATCHES_AHEAD batches in advance, no more.
    """
    chunks = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        waiting: deque = deque()
        for chunk in chunks + [None] * BATCHES_AHEAD:
            if chunk is not None:
                waiting.append((chunk, [pool.submit(scan.model_input, k) for k in chunk]))
            if waiting and (chunk is None or len(waiting) > BATCHES_AHEAD):
                ready, images = waiting.popleft()
                yield ready, torch.from_numpy(np.stack([image.result() for image in images]))


@torch.inference_mode()
def slice_logits(
    predictor: Predictor, images: Tensor, numbers: Sequence[int], given: SlicePrompts | None
) -> Tensor:
    """Logits (n, C, size, size) float32 on the device, of slices `numbers`."""
    device = predictor.precision.device
    prompts: dict[str, Any] = {}
    if given is not None:
        prompts = given.batch(numbers, len(predictor.classes), row_col=predictor.points_are_row_col)
        points, boxes = prompts["points"], prompts["boxes"]
        prompts = {
            "points": points and tuple(part.to(device) for part in points),
            "boxes": None if boxes is None else boxes.to(device),
        }
    with predictor.precision.autocast():
        logits = predictor.model(images.to(device).float() / 255, **prompts).float()
    # Classes side by side: a CPU then resizes and compares them four times as fast.
    return logits.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def to_native(logits: Tensor, box: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Logits (N, C, h, w) of the part `box` of slices, at their native `size` (N, C, H, W).

    Bilinear; the grids share their outer edges. Outside the box (y0, y1, x0, x1) the first class,
    background, has all the probability.
    """
    y0, y1, x0, x1 = box
    inside = F.interpolate(logits, (y1 - y0, x1 - x0), mode="bilinear", align_corners=False)
    if inside.shape[-2:] == tuple(size):
        return inside
    margins = (x0, size[1] - x1, y0, size[0] - y1)
    background = F.pad(inside[:, :1], margins, value=0.0)
    return torch.cat([background, F.pad(inside[:, 1:], margins, value=float("-inf"))], dim=1)


def _write_background(
    scan: ScanSlices, file: ProbabilityFile | ProbabilityArray, numbers: Sequence[int]
) -> None:
    """Write slices without a prompt as background with probability 1."""
    steps = np.zeros((1, file.shape[3], *scan.shape[1:]), dtype=np.uint16)
    steps[:, 0] = STEPS
    for k in numbers:
        file.write([k], steps, scan.canonical)


def _draw(
    scan: ScanSlices,
    labels: np.ndarray,
    predictor: Predictor,
    prompts: ScanPrompts,
    path: Path,
    name: str,
) -> None:
    """A montage of slices with prompts or foreground, as the model saw them, from the feet."""
    marks = marks_on_slices(prompts, scan) if predictor.prompt_mode else {}
    foreground = np.array([np.count_nonzero(plane) for plane in labels])
    is_stored = scan.orientation == "stored"  # slices lie on their side
    numbers, panels = slice_numbers(scan), []
    for k in spread_slices(foreground, wanted=sorted(marks)):
        image, label = scan.plane(k), labels[k]
        points, boxes = marks.get(k, ((), ()))
        if is_stored:
            image, label = image.T, label.T
            points = [(y, x, sign) for x, y, sign in points]
            boxes = [(y1, x1, y2, x2) for x1, y1, x2, y2 in boxes]
        title = f"slice {numbers[k]}"
        panels.append(Panel(title, image, label, scan.pixel_aspect, tuple(points), tuple(boxes)))
    save_montage(path, panels, classes=predictor.classes, colors=predictor.colors, title=name)
