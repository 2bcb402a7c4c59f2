"""A training step of U-SAM against the plain network's: images a second, memory, share of the peak.

    python -m benchmarks.train_step [--quick] [--device cuda] [--threads N] [--rounds N]

Batches lie ready in the host's memory; what is timed is the engine's own loop, with its transfer,
augmentation, loss, checks and optimizer, against a plain loop on batches augmented beforehand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.baseline import PlainUSam, plain_steps, plain_twin
from benchmarks.harness import Row, Work
from dataset.transforms import augment
from usam.models.usam import USam, build_usam
from usam.runtime.precision import Precision
from usam.training import engine
from usam.training.checkpoint import TrainingState
from usam.training.ema import WeightAverage
from usam.training.execution import compile_training
from usam.training.optimizer import build_optimizer
from usam.training.usam import SegmentationStep

CLASSES = 3
GIB = 2**30


class Case(NamedTuple):
    """One comparison: both sides' precision ("float32" is exact), steps a timing."""

    size: int
    batch: int
    ours: str
    baseline: str
    goal: str = ""
    steps: int = 1
    compiled: bool = False

    def __str__(self) -> str:
        extra = " compiled" if self.compiled else ""
        kind = "exact" if self.ours == "float32" and not self.compiled else "precision"
        name = f"{kind}: {self.ours}{extra} / {self.baseline} eager"
        return f"{name}, {self.size} x {self.size}, batch {self.batch}"


ON_CPU = (
    Case(112, 8, "float32", "float32", "1.3x"),
    Case(112, 8, "bfloat16", "float32", "2x"),
    Case(224, 4, "float32", "float32", "1.3x"),
    Case(224, 4, "bfloat16", "float32", "2x"),
    Case(224, 4, "bfloat16", "bfloat16"),
)
ON_GPU = (
    *(Case(224, n, "float32", "float32", steps=10) for n in (8, 24, 96)),
    *(Case(224, n, "bfloat16", "float32", steps=10) for n in (8, 24, 96)),
    *(Case(224, n, "bfloat16", "bfloat16", steps=10) for n in (8, 24, 96)),
    Case(224, 24, "bfloat16", "float32", "6x", 10, True),
    Case(224, 24, "bfloat16", "bfloat16", "2x", 10, True),
)
QUICK = (
    Case(32, 2, "float32", "float32"),
    Case(32, 2, "bfloat16", "bfloat16", "", 2),
)
QUICK_ON_GPU = (*QUICK, Case(32, 2, "bfloat16", "bfloat16", "", 2, True))


class ReadyBatches:
    """A loader for the engine over batches made beforehand, and its own batch sampler."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = case.batch, 1, case.size, case.size
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        mask = torch.randint(0, CLASSES, (case.batch, *shape[2:]), generator=generator)
        self.batches = [{"image": image, "mask": mask.byte()}] * case.steps
        if torch.cuda.is_available():
            self.batches = [{k: v.pin_memory() for k, v in b.items()} for b in self.batches]
        self.batch_sampler, self.samples_per_step = self, case.batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)

    def plain(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The same as the plain pipeline hands them over: three float channels, long labels."""
        return [(b["image"].expand(-1, 3, -1, -1) / 255, b["mask"].long()) for b in self.batches]


def precision_of(name: str, device: torch.device) -> Precision:
    return Precision(device, None if name == "float32" else getattr(torch, name))


def our_work(model: USam, case: Case, device: torch.device) -> Work:
    """The engine's epoch over the case's batches."""
    precision = precision_of(case.ours, device)
    optimizer = build_optimizer(model.parameter_groups(1e-4, 1e-5, 1e-5), 1e-4)
    loader, step = ReadyBatches(case), SegmentationStep(device, augment)
    recipe = engine.Recipe(seed=0, total_samples=10**9)
    return lambda: engine.train_one_epoch(
        model, loader, fresh_state(model, optimizer, precision), step=step, recipe=recipe,
        precision=precision,
    )  # fmt: skip


def fresh_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: Precision
) -> TrainingState:
    """The state of a run at its start, without an average of the weights."""
    average = WeightAverage(model, 0.0)
    return TrainingState(model, optimizer, precision.scaler(), average, facts={})


def plain_work(model: PlainUSam, case: Case) -> Work:
    """The plain loop over the same batches."""
    dtype = None if case.baseline == "float32" else getattr(torch, case.baseline)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4)
    batches = ReadyBatches(case).plain()
    return lambda: plain_steps(model, optimizer, batches, dtype)


def compare(case: Case, options: argparse.Namespace) -> tuple[Row, float, float]:
    """The case's row, the median seconds of one of our steps, and those it took to compile."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = build_usam(options.sam_model, CLASSES, case.size).to(device)
    plain = plain_twin(model, options.sam_model)
    compiling = harness.seconds(lambda: compiled(model, case, device), device)
    pairs = harness.paired_seconds(
        our_work(model, case, device), plain_work(plain, case),
        rounds=options.rounds, device=device,
    )  # fmt: skip
    row = harness.compared(Row(str(case), case.goal), pairs, case.batch * case.steps, "images/s")
    return row, statistics.median(ours for ours, _ in pairs) / case.steps, compiling


def compiled(model: USam, case: Case, device: torch.device) -> None:
    """Compile in place what the case wants compiled. Raises RuntimeError where that fails."""
    if not case.compiled:
        return
    step = SegmentationStep(device, augment)
    sample = {key: value[0] for key, value in ReadyBatches(case).batches[0].items()}
    precision = precision_of(case.ours, device)
    if not compile_training(model, step, [sample] * case.batch, precision):
        raise RuntimeError(f"{case}: the compiler failed")


def host_syncs(case: Case, options: argparse.Namespace) -> Row:
    """How often a CUDA step waits for the device between two prints: 8 steps against 4."""
    device = torch.device(options.device)
    model, found = build_usam(options.sam_model, CLASSES, case.size).to(device), {}
    for steps in (4, 8):
        work = our_work(model, case._replace(steps=steps), device)
        work()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        torch.cuda.set_sync_debug_mode("default")
        found[steps] = sum("synchroniz" in str(warning.message) for warning in caught)
    a_step = (found[8] - found[4]) / 4
    return Row("host syncs a step between two prints", "0", f"{a_step:g}", "-", "-")


def share_of_peak(case: Case, seconds: float, options: argparse.Namespace) -> str:
    """How much of the measured peaks of products and copies one of our steps reaches, in words."""
    device = torch.device(options.device)
    model = build_usam(options.sam_model, CLASSES, case.size).to(device)
    work = our_work(model, case._replace(steps=1), device)
    with FlopCounterMode(display=False) as counter:
        work()
    with harness.BytesMoved() as traffic:
        work()
    flops, moved, peaks = counter.get_total_flops(), traffic.bytes, harness.peaks(device)
    return (
        f"{case}: a step of ours is {flops / 1e9:.0f} GFLOP and moves {moved / 1e9:.1f} GB "
        f"uncompiled (both counted): {100 * flops / seconds / peaks[case.ours]:.0f} % of the "
        f"measured products, {100 * moved / seconds / peaks['copy']:.0f} % of the measured copies"
    )


def peak_memory(name: str, case: Case, options: argparse.Namespace) -> int:
    """Bytes one step takes above the network with its optimizer state, in this process."""
    device = torch.device(options.device)
    model = build_usam(options.sam_model, CLASSES, case.size).to(device)
    if name == "ours":
        work = our_work(model, case, device)
    else:
        work = plain_work(plain_twin(model, options.sam_model), case)
    work()
    with harness.PeakMemory(device) as peak:
        work()
    return peak.bytes


def memory_row(case: Case, options: argparse.Namespace) -> Row:
    """Peak memory of both sides, each in a process of its own."""
    used = {}
    for name in ("ours", "plain"):
        command = [sys.executable, "-m", "benchmarks.train_step", "--memory_of", name]
        command += ["--case", json.dumps(case), "--sam_model", options.sam_model]
        command += ["--device", options.device, "--threads", str(options.threads)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        used[name] = json.loads(result.stdout.splitlines()[-1])
    return memory_title(case)._replace(
        ours=f"{used['ours'] / GIB:.2f} GiB", baseline=f"{used['plain'] / GIB:.2f} GiB",
        ratio=f"{used['ours'] / max(used['plain'], 1):.2f}",
    )  # fmt: skip


def memory_title(case: Case) -> Row:
    return Row(f"peak memory above weights and optimizer: {case}", "0.5x")


def memory_case(options: argparse.Namespace) -> Case:
    on_gpu = options.device.startswith("cuda")
    full = Case(224, 24 if on_gpu else 4, "bfloat16", "float32")
    return QUICK[1] if options.quick else full


def arguments() -> argparse.Namespace:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--sam_model", default="vit_b")
    parser.add_argument("--memory_of", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=lambda text: Case(*json.loads(text)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.sam_model, options.rounds = "vit_tiny", 1
    return options


def main() -> None:
    options = arguments()
    harness.set_up(options)
    on_gpu = options.device.startswith("cuda")
    cases = ON_GPU if on_gpu else ON_CPU
    if options.quick:
        cases = QUICK_ON_GPU if on_gpu else QUICK
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options.case, options)))
        return
    if options.unmeasured:
        titles = [*(Row(str(c), c.goal) for c in cases), memory_title(memory_case(options))]
        print(harness.table(titles))
        return
    device, rows, notes, eager = torch.device(options.device), [], [], {}
    for case in cases:
        row, seconds, compiling = compare(case, options)
        rows.append(row)
        notes.append(share_of_peak(case, seconds, options))
        if case.compiled:
            gained = eager[case.batch, case.ours] - seconds
            steps = f"{compiling / gained:.0f} steps" if gained > 0 else "never"
            notes.append(f"{case}: {compiling:.0f} s to compile, made good after {steps}")
        else:
            eager[case.batch, case.ours] = seconds
    if on_gpu:
        rows.append(host_syncs(cases[0], options))
    rows.append(memory_row(memory_case(options), options))
    print(f"U-SAM {options.sam_model}, training; {harness.machine(device)}")
    print(harness.peaks_line(device) + "\n")
    print(harness.table(rows) + "\n")
    print("\n".join(f"- {note}" for note in dict.fromkeys(notes)))


if __name__ == "__main__":
    main()
