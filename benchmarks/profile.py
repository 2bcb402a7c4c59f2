"""Where a training step's time goes: a trace for a viewer and the 20 costliest operations.

    python -m benchmarks.profile [--size 224] [--batch 8] [--dtype bfloat16] [--trace step.json]

The trace opens in chrome://tracing or Perfetto; the table is sorted by the device's own time.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.train_step import CLASSES, Case, our_work
from usam.model import build_usam

ROWS = 20


def main() -> None:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--sam_model", default="vit_b")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--trace", type=Path, default=Path("step.json"))
    options = parser.parse_args()
    if options.quick:
        options.sam_model, options.size, options.batch = "vit_tiny", 32, 2
    harness.set_up(options)
    device = torch.device(options.device)
    model = build_usam(options.sam_model, CLASSES, options.size).to(device)
    work = our_work(model, Case(options.size, options.batch, options.dtype, ""), device)
    work()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
    profiler.export_chrome_trace(os.fspath(options.trace))
    kind = "cuda" if device.type == "cuda" else "cpu"
    print(f"{options.sam_model}, {options.size} pixels, batch {options.batch}, {options.dtype}")
    print(harness.machine(device))
    print(profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=ROWS))
    print(f"trace: {options.trace}")


if __name__ == "__main__":
    main()
