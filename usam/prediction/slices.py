"""A scan in, a segmentation in the scan's own geometry out.

The model sees slices in batches; neither logits nor floats of a whole volume are ever held.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset.scans.find import find_scans, output_names
from dataset.scans.slices import ScanSlices
from dataset.scans.window import parse_window
from dataset.scans.write import STEPS, ProbabilityFile, write_label_map
from usam.prediction import output as scan_output
from usam.prediction.prompts import (
    PreparedScan,
    ScanPrompts,
    SlicePrompts,
    prompts_from_flags,
    read_prompts,
    slice_prompts,
)
from usam.runtime import processes
from usam.runtime.precision import Precision
from usam.runtime.processes import is_main
from usam.weights.inference import answers_text, load_for_inference

BATCHES_AHEAD = 2  # prepared while the device works
PREPARED = ("orientation", "spacing", "img_size", "input", "clahe", "crop", "body_crop")  # of data


def predict(args: Namespace, precision: Precision, saved: dict[str, Any]) -> None:
    """Segment the scans of --predict, each process its share; raises ValueError if one failed."""
    data, scans = saved["data"], find_scans(args.predict)
    model, row_col = load_for_inference(args, precision.device, saved)
    predictor = Predictor(
        model, precision, data, prompt_mode=args.prompt_mode,
        points_are_row_col=row_col, batch_size=args.batch_size,
        threads=args.num_workers, probabilities=args.probabilities, overlay=args.overlay,
        largest_component=args.largest_component,
    )  # fmt: skip
    window = parse_window(args.window) if args.window else None
    named = list(zip(scans, output_names(scans), strict=True))
    failed = predict_scans(
        named[processes.rank() :: processes.world_size()], args.output_dir, predictor,
        open_scan=partial(ScanSlices, data=data, window=window, channel=args.channel),
        prompts_for=prompts_of(args, len(scans)),
        facts=answers_text(args) | {"model": f"u-sam {args.sam_model}"},
    )  # fmt: skip
    if len(scans) == 1 and failed:
        raise failed[0][1]
    number = int(processes.reduce_sum(torch.tensor(len(failed), device=precision.device)))
    if number:
        raise ValueError(f"{number} of {len(scans)} scans were not segmented, see above")


def prompts_of(args: Namespace, num_scans: int) -> Callable[[Path], ScanPrompts]:
    """What gives the prompts of a scan: the flags, or the JSON file they name."""
    if args.prompts:
        return lambda path: read_prompts(args.prompts, path.name)
    given = prompts_from_flags(args.point, args.box, args.slice, mm=args.mm)
    if given and num_scans > 1:
        raise ValueError(
            f"--box and --point mark one scan, --predict names {num_scans}; use --prompts FILE"
        )
    return lambda path: given


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
    overlay: bool = False
    largest_component: bool = False

    @property
    def classes(self) -> list[str]:
        """Class names by label id."""
        return list(self.data["classes"])

    @property
    def colors(self) -> list[str]:
        """Class colours by label id."""
        return scan_output.class_colors(self.data.get("colors"), len(self.classes))


def predict_scans(
    scans: Sequence[tuple[Path, str]],
    folder: Path,
    predictor: Predictor,
    *,
    open_scan: Callable[[Path], PreparedScan],
    prompts_for: Callable[[Path], ScanPrompts],
    facts: Mapping[str, Any],
) -> list[tuple[Path, Exception]]:
    """Segment every scan of (path, name of its results) into `folder`; those that failed.

    One bad scan is reported and does not stop the others. facts go into every JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictor.model.eval()
    failed = []
    bar = tqdm(
        scans, desc="predicting", unit="scan", disable=not is_main() or len(scans) < 2, leave=False
    )
    for path, name in bar:
        try:
            scan = open_scan(path)
            line = predict_scan(
                scan, folder, name, predictor, prompts=prompts_for(path), facts=facts
            )
        except (ValueError, OSError) as error:
            failed.append((path, error))
            if len(scans) > 1:
                tqdm.write(f"u-sam.py: error: {error}", file=sys.stderr)
        else:
            tqdm.write(line)
    return failed


def predict_scan(
    scan: PreparedScan,
    folder: Path,
    name: str,
    predictor: Predictor,
    *,
    prompts: ScanPrompts,
    facts: Mapping[str, Any],
) -> str:
    """Write NAME_seg.nii.gz, NAME_seg.json and what else was asked for; a line on what was found.

    Raises ValueError where the prompts do not fit the model or the scan.
    """
    given = slice_prompts(prompts, predictor.prompt_mode, scan)
    label = np.zeros(scan.header.shape, dtype=np.uint8, order="F")
    if predictor.probabilities:
        sink = ProbabilityFile(
            folder / f"{name}_probabilities.nii", len(predictor.classes), scan.header
        )
    else:
        sink = nullcontext()
    with sink as opened:
        _segment(scan, predictor, given, scan.canonical(label), opened, name)
    if predictor.largest_component:
        scan_output.keep_largest(label)
    path = folder / f"{name}_seg.nii.gz"
    write_label_map(path, label, scan.header)
    rows = scan_output.class_volumes(
        scan_output.count_voxels(label, len(predictor.classes)),
        predictor.classes,
        predictor.colors,
        scan.header.voxel_ml,
    )
    about = describe(scan, given, predictor) | dict(facts)
    scan_output.write_description(folder / f"{name}_seg.json", about | {"classes": rows})
    if predictor.overlay:
        _draw(folder / f"{name}_overlay.png", scan, scan.canonical(label), predictor, name)
    return f"{path}: {one_line(rows)}"


def describe(
    scan: PreparedScan, given: SlicePrompts | None, predictor: Predictor
) -> dict[str, Any]:
    """What the JSON says of a scan; its file's name, never its folder."""
    header = scan.header
    return {
        "input": header.path.name,
        "shape": list(header.shape),
        "spacing_mm": None if header.spacing is None else [round(s, 6) for s in header.spacing],
        "window": list(scan.window) if isinstance(scan.window, tuple) else scan.window,
        **{name: predictor.data.get(name) for name in PREPARED},
        "prompted_slices": None if given is None else given.slices,
        "largest_component": predictor.largest_component,
    }


def one_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """The classes found, with their volumes, for the terminal."""
    found = [row for row in rows[1:] if row["voxels"]]
    if not found:
        return "no foreground"
    sizes = [
        f"{row['name']} {row['voxels']} voxels"
        if row["volume_ml"] is None
        else f"{row['name']} {row['volume_ml']:.1f} ml"
        for row in found
    ]
    return ", ".join(sizes)


def _segment(
    scan: PreparedScan,
    predictor: Predictor,
    given: SlicePrompts | None,
    labels: np.ndarray,
    probabilities: ProbabilityFile | None,
    name: str,
) -> None:
    """Fill labels (S, H, W), zero before, slice by slice; a slice without a prompt stays zero."""
    numbers = list(range(len(scan))) if given is None else given.slices
    size = labels.shape[1:]
    if probabilities is not None and len(numbers) < len(scan):
        _write_background(scan, probabilities, sorted(set(range(len(scan))) - set(numbers)))
    with tqdm(
        total=len(numbers), desc=name, unit="slice", leave=False, disable=not is_main()
    ) as bar:
        for chunk, images in prepared(scan, numbers, predictor.batch_size, predictor.threads):
            logits = _forward(predictor, images, chunk, given)
            for k, one in zip(chunk, logits, strict=True):
                native = to_native(one[None], scan.box, size)
                labels[k] = native.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
                if probabilities is not None:
                    steps = (native.softmax(dim=1) * STEPS).round().int().cpu().numpy()
                    probabilities.write([k], steps.astype(np.uint16), scan.canonical)
            bar.update(len(chunk))


def prepared(
    scan: PreparedScan, numbers: Sequence[int], batch_size: int, threads: int
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
def _forward(
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


def _write_background(scan: PreparedScan, file: ProbabilityFile, numbers: Sequence[int]) -> None:
    """Certain background in slices that no prompt asks about."""
    steps = np.zeros((1, file.shape[3], *scan.shape[1:]), dtype=np.uint16)
    steps[:, 0] = STEPS
    for k in numbers:
        file.write([k], steps, scan.canonical)


def _draw(
    path: Path, scan: PreparedScan, labels: np.ndarray, predictor: Predictor, name: str
) -> None:
    """A montage of slices with foreground, as the model saw them."""
    numbers = scan_output.montage_slices(np.array([np.count_nonzero(plane) for plane in labels]))
    stored = predictor.data["orientation"] == "stored"
    scan_output.save_montage(
        path, numbers, scan.plane, labels, classes=predictor.classes, colors=predictor.colors,
        aspect=scan.pixel_aspect, transpose=stored, title=name,
    )  # fmt: skip
