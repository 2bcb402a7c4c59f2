"""Evaluation of U-SAM against the plain network's: the model alone, and from disk to counts.

    python -m benchmarks.evaluate [--quick] [--device cuda] [--threads N] [--rounds N]

Ours is the engine's own evaluation, counts as integers on the device; the plain side computes in
float32 and reads its sums class by class. From disk: a slice store against npz files.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from benchmarks import harness
from benchmarks.baseline import PlainUSam, plain_evaluation, plain_twin
from benchmarks.data import write_slices
from benchmarks.harness import Row, Work
from benchmarks.plain_data import PlainSlices
from benchmarks.train_step import CLASSES, ReadyBatches, precision_of
from benchmarks.train_step import Case as Batches
from dataset.slices import SliceDataset
from dataset.store.slices import SliceStore
from usam.evaluation.pixels import count_pixels
from usam.models.usam import USam, build_usam
from usam.runtime.precision import Precision


class Case(NamedTuple):
    """One comparison: size, batch sizes of both sides, our precision ("float32" is exact)."""

    size: int
    ours_batch: int
    plain_batch: int
    ours: str
    goal: str = ""
    images: int = 8
    from_disk: bool = False

    def __str__(self) -> str:
        kind = "exact" if self.ours == "float32" else "precision"
        what = "from disk" if self.from_disk else "model only"
        batches = f"batch {self.ours_batch} / {self.plain_batch}"
        return f"{kind}: {self.ours} / float32, {what}, {self.size} x {self.size}, {batches}"


ON_CPU = (
    Case(112, 8, 8, "float32", "1.5x"),
    Case(112, 8, 8, "bfloat16", "3x"),
    Case(224, 8, 8, "float32", "1.5x"),
    Case(224, 8, 8, "bfloat16", "3x"),
    Case(224, 8, 8, "bfloat16", "3x", 16, True),
)
ON_GPU = (
    *(Case(224, n, n, "float32", "", 4 * n) for n in (8, 24, 96)),
    *(Case(224, n, n, "bfloat16", "12x", 4 * n) for n in (8, 24, 96)),
    Case(224, 96, 24, "bfloat16", "12x", 384),
    Case(224, 96, 24, "bfloat16", "20x", 384, True),
)
QUICK = (Case(32, 2, 2, "float32"), Case(32, 2, 2, "bfloat16", "", 4, True))


def our_work(model: USam, loader: Any, precision: Precision) -> Work:
    """The engine's evaluation, until the counts are on the host."""
    return lambda: count_pixels(model, loader, prompt_mode=0, precision=precision).tensor.tolist()


def in_memory(case: Case, model: USam, plain: PlainUSam, device: torch.device) -> tuple[Work, Work]:
    """Both evaluations over batches that lie ready in the host's memory."""
    steps = case.images // case.ours_batch
    ours = ReadyBatches(Batches(case.size, case.ours_batch, "", "", steps=steps))
    steps = case.images // case.plain_batch
    theirs = ReadyBatches(Batches(case.size, case.plain_batch, "", "", steps=steps)).plain()
    return (
        our_work(model, ours, precision_of(case.ours, device)),
        lambda: plain_evaluation(plain, theirs),
    )


def from_disk(
    case: Case, model: USam, plain: PlainUSam, *, folder: Path, options: argparse.Namespace
) -> tuple[Work, Work]:
    """Both evaluations with their loaders: the packed store, and one npz a slice."""
    write_slices(folder, case.images, side=2 * case.size)
    store = SliceStore(folder / "store")
    data = SliceDataset(store, store.slices("test"), img_size=case.size)
    workers = options.num_workers
    how = {"num_workers": workers, "persistent_workers": workers > 0}
    ours = DataLoader(data, case.ours_batch, pin_memory=torch.cuda.is_available(), **how)
    theirs = DataLoader(PlainSlices(folder / "npz", case.size, False), case.plain_batch, **how)
    precision = precision_of(case.ours, torch.device(options.device))
    return our_work(model, ours, precision), lambda: plain_evaluation(plain, theirs)


def compare(case: Case, options: argparse.Namespace) -> Row:
    """The row of one case."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = build_usam(options.sam_model, CLASSES, case.size).to(device)
    plain = plain_twin(model, options.sam_model)
    with tempfile.TemporaryDirectory() as folder:
        if case.from_disk:
            works = from_disk(case, model, plain, folder=Path(folder), options=options)
        else:
            works = in_memory(case, model, plain, device)
        pairs = harness.paired_seconds(*works, rounds=options.rounds, device=device)
    return harness.compared(Row(str(case), case.goal), pairs, case.images, "images/s")


def main() -> None:
    parser = harness.device_parser(__doc__)
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--num_workers", type=int, default=workers, help="of both loaders")
    options = parser.parse_args()
    options.sam_model = "vit_tiny" if options.quick else "vit_b"
    title = f"U-SAM {options.sam_model}, evaluation"
    harness.run_rows(title, options, compare, harness.Cases(ON_CPU, ON_GPU, QUICK))


if __name__ == "__main__":
    main()
