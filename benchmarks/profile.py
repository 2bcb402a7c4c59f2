"""Where a training step and an evaluation spend their time: the costliest operations, and a trace.

    python -m benchmarks.profile [--quick] [--size 224] [--batch 4] [--rows 20] [--trace step.json]

Shares are of the device's own time, that of matrix products and convolutions (the library's, beyond
which nothing here reaches) is summed up. The trace, of the last table, opens in Perfetto.
"""

from __future__ import annotations

import argparse
import os
from itertools import product
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.evaluate import our_work as evaluation
from benchmarks.train_step import CLASSES, Case, ReadyBatches, precision_of
from benchmarks.train_step import our_work as training
from usam.models.usam import build_usam

PRODUCTS = ("mm", "attention", "conv", "cutlass", "nvjet", "flash", "wgrad", "dgrad", "fprop")
ROWS = 20
WHAT, DTYPES = ("training", "evaluation"), ("float32", "bfloat16")


def profiled(work: harness.Work, device: torch.device) -> profile:
    """One call of `work`, profiled after one that was not."""
    work()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
    return profiler


def shares(profiler: profile, kind: str, rows: int) -> str:
    """A Markdown table of the operations with most time of their own, and the products' sum."""
    found = [
        (event.key, getattr(event, f"self_{kind}_time_total"), event.count)
        for event in profiler.key_averages()
        if kind == "cpu" or event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]  # an operation's device time is that of its kernels, which are also listed
    found = sorted((row for row in found if row[1] > 0), key=lambda row: -row[1])
    whole = sum(spent for _, spent, _ in found)
    products = sum(spent for name, spent, _ in found if any(part in name for part in PRODUCTS))
    lines = ["| operation | ms | share | calls |", "| --- | --- | --- | --- |"]
    for name, spent, calls in found[:rows]:
        lines.append(f"| {name[:60]} | {spent / 1e3:.2f} | {100 * spent / whole:.1f} % | {calls} |")
    lines.append(f"| **products and convolutions** | {products / 1e3:.1f} | "
                 f"{100 * products / whole:.1f} % | |")  # fmt: skip
    return "\n".join([*lines, f"| **all** | {whole / 1e3:.1f} | 100 % | |"])


def arguments() -> argparse.Namespace:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--sam_model", default="vit_b")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rows", type=int, default=ROWS, help="of each table")
    parser.add_argument("--trace", type=Path, help="write a trace for a viewer there")
    options = parser.parse_args()
    if options.quick:
        options.sam_model, options.size, options.batch = "vit_tiny", 32, 2
    return options


def main() -> None:
    options = arguments()
    harness.set_up(options)
    if options.unmeasured:
        print(harness.UNMEASURED)
        return
    device = torch.device(options.device)
    kind = "device" if device.type == "cuda" else "cpu"
    print(f"U-SAM {options.sam_model}, {options.size} pixels, batch {options.batch}; "
          f"{harness.machine(device)}")  # fmt: skip
    for what, dtype in product(options.what, options.dtype):
        model = build_usam(options.sam_model, CLASSES, options.size).to(device)
        case = Case(options.size, options.batch, dtype, "")
        if what == "training":
            work = training(model, case, device)
        else:
            work = evaluation(model, ReadyBatches(case), precision_of(dtype, device))
        profiler = profiled(work, device)
        print(f"\n{what}, {dtype}\n\n{shares(profiler, kind, options.rows)}")
    if options.trace:
        profiler.export_chrome_trace(os.fspath(options.trace))
        print(f"\ntrace: {options.trace}")


if __name__ == "__main__":
    main()
