"""What a plan is made from: a summary of the data, and how long a training step takes."""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch

from dataset import SliceDataset
from dataset.transforms import AUGMENTATIONS
from usam.models.usam import build_usam
from usam.planning.plan import CPU, EMA, GPU, Cost, Machine, Summary
from usam.runtime import processes
from usam.runtime.loaders import Batch, SkipUnreadable, collate, to_device
from usam.runtime.precision import Precision
from usam.training.ema import WeightAverage
from usam.training.optimizer import build_optimizer
from usam.training.usam import SegmentationStep
from usam.weights.usam import stride_to_start_from

SECONDS, MAX_TIMES = 3.0, 10  # how long and how often a step is repeated


def summarize(train: SliceDataset, val: SliceDataset) -> Summary:
    """The summary of slices to train on and to validate on."""
    cases = [train.store.cases[number] for number in sorted(train.case_numbers)]
    heights, widths = zip(*(case["shape"][1:] for case in cases), strict=True)
    seen = 1 - 2 * train.crop
    known = [case["spacing"][1:] for case in cases if case["spacing"]]
    pixels = np.array([train.store.cases[n]["pixels"][k] for n, k in train.places], dtype=float)
    return Summary(
        cases=len(cases),
        slices=len(train),
        val_slices=len(val),
        height=round(float(np.median(heights)) * seen),
        width=round(float(np.median(widths)) * seen),
        spacing=float(np.median(known)) if known else None,
        classes=tuple(train.classes),
        shares=tuple((pixels.sum(0) / pixels.sum()).tolist()),
        shown=tuple((pixels > 0).mean(0).tolist()),
    )


def machine_of(device: torch.device) -> Machine:
    """The machine that trains on `device`; Apple's GPUs count as CPUs, whose memory they share."""
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"the {device.type.upper()}"
    return Machine(GPU if is_gpu else CPU, name, processes.world_size())


def measure(args: Namespace, precision: Precision, data: SliceDataset) -> Cost:
    """The cost of a training by the flags `args`, measured on a few steps of `data`.

    The model has random weights and is thrown away. Steps are not compiled, and gradients are not
    exchanged with other processes. On a GPU, workers load the next batch meanwhile.
    """
    started = time.perf_counter()
    on_gpu = precision.device.type == "cuda"
    memory = 0.0
    try:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(precision.device)
        load, train, validate = trial(args, precision, data)
        if on_gpu:
            total = torch.cuda.get_device_properties(precision.device).total_memory
            memory = torch.cuda.max_memory_reserved(precision.device) / total
            load /= max(args.num_workers, 1)
        step, validation = (max(load, s) if on_gpu else load + s for s in (train, validate))
    except torch.cuda.OutOfMemoryError:
        step, validation, memory = math.inf, 0.0, math.inf
    return Cost(step, validation / args.batch_size, memory, time.perf_counter() - started)


def trial(args: Namespace, precision: Precision, data: SliceDataset) -> tuple[float, float, float]:
    """Seconds to load a batch, to train on it, and to compute its logits for validation."""
    device = precision.device
    stride = stride_to_start_from(args.sam_model, args.sam_weight, args.init)
    model = build_usam(
        args.sam_model, len(data.classes), args.img_size, args.adapter, args.tuning, stride
    ).to(device)
    rates = model.parameter_groups(args.lr, args.lr_vit, args.lr_backbone)
    optimizer, average = build_optimizer(rates, args.weight_decay), WeightAverage(model, EMA[0])
    step = SegmentationStep(device, AUGMENTATIONS[args.augment], args.prompt_mode)
    generator = torch.Generator().manual_seed(args.seed)
    numbers = np.linspace(0, len(data) - 1, args.batch_size).astype(int).tolist()
    readable = SkipUnreadable(data)

    def load() -> Batch:
        return collate([readable[number, 0] for number in numbers])

    def train() -> None:
        with precision.autocast():
            loss = step(model, batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()

    @torch.no_grad()
    def validate() -> None:
        with precision.autocast():
            model(to_device(batch, device)[0])

    batch, loading = load(), seconds_of(load, device)
    training = seconds_of(train, device)
    model.eval()
    return loading, training, seconds_of(validate, device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The median time of `run`, repeated for SECONDS, without the first, which warms up."""
    times: list[float] = []
    while not times or (len(times) <= MAX_TIMES and sum(times) < SECONDS):
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)
