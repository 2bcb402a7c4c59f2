"""What a training step of U-SAM takes in memory, by size, batch and --checkpoint_activations.

    python -m benchmarks.memory [--quick] [--device cuda] [--threads N]

Everything counts: weights, gradients, optimizer state and the step's peak above them, each setting
in a process of its own; also seconds a step, since recomputing costs time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import NamedTuple

import torch

from benchmarks import harness
from benchmarks.train_step import CLASSES, GIB, Case, our_work
from usam.models.usam import build_usam
from usam.training.execution import checkpoint_activations


class Setting(NamedTuple):
    """A training step: size of the input, batch, whether activations are recomputed."""

    size: int
    batch: int
    recompute: bool


ON_CPU = tuple(
    Setting(size, batch, recompute)
    for size, batch in ((224, 8), (512, 2), (1024, 1))
    for recompute in (False, True)
)
ON_GPU = tuple(
    Setting(size, batch, recompute)
    for size, batch in ((224, 24), (224, 96), (512, 8), (1024, 1), (1024, 2))
    for recompute in (False, True)
)
QUICK = (Setting(32, 2, True),)


def measure(setting: Setting, options: argparse.Namespace) -> tuple[int, float]:
    """Peak bytes of a training process above its start, and seconds of a warm step."""
    device = torch.device(options.device)
    case = Case(setting.size, setting.batch, "bfloat16", "")
    with harness.PeakMemory(device) as peak:
        model = build_usam(options.sam_model, CLASSES, setting.size).to(device)
        if setting.recompute:
            checkpoint_activations(model)
        work = our_work(model, case, device)
        work()
        took = harness.seconds(work, device)
    return peak.bytes, took


def main() -> None:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sam_model = "vit_tiny" if options.quick else "vit_b"
    harness.set_up(options)
    if options.setting:
        print(json.dumps(measure(Setting(*json.loads(options.setting)), options)))
        return
    settings = ON_GPU if options.device.startswith("cuda") else ON_CPU
    settings = QUICK if options.quick else settings
    lines = ["| size | batch | --checkpoint_activations | peak, GiB | seconds a step |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for setting in settings:
        found = (harness.UNMEASURED, harness.UNMEASURED)
        if not options.unmeasured:
            found = elsewhere(setting, options)
        how = "yes" if setting.recompute else "no"
        lines.append(f"| {setting.size} | {setting.batch} | {how} | {found[0]} | {found[1]} |")
    if not options.unmeasured:
        device = torch.device(options.device)
        print(f"U-SAM {options.sam_model}, bfloat16, training; {harness.machine(device)}\n")
    print("\n".join(lines))


def elsewhere(setting: Setting, options: argparse.Namespace) -> tuple[str, str]:
    """`measure` in a process of its own, as text; what does not fit is said."""
    command = [sys.executable, "-m", "benchmarks.memory", "--setting", json.dumps(setting)]
    command += ["--device", options.device, "--threads", str(options.threads)]
    command += ["--quick"] * options.quick
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["killed"])[-1]
        return f"failed: {reason[:80]}", "-"
    peak, took = json.loads(result.stdout.splitlines()[-1])
    return f"{peak / GIB:.2f}", f"{took:.2f}"


if __name__ == "__main__":
    main()
