"""Training from disk, loaders included, and how long a checkpoint holds a training up.

    python -m benchmarks.end_to_end [--quick] [--device cuda] [--threads N] [--num_workers 0 2 8]

Ours reads a slice store, the plain side one npz a slice; both train the same network. A save is
compared with torch.save and fsync of the same state in the training's own thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from benchmarks import harness
from benchmarks.baseline import plain_steps, plain_twin
from benchmarks.data import write_slices
from benchmarks.harness import Row
from benchmarks.plain_data import PlainSlices
from benchmarks.train_step import CLASSES, fresh_state, precision_of
from dataset.slices import SliceDataset
from dataset.store.slices import SliceStore
from dataset.transforms import augment
from usam.models.usam import build_usam
from usam.runtime.loaders import loader_for
from usam.runtime.samplers import TrainingBatches
from usam.training import engine
from usam.training.checkpoint import CheckpointWriter
from usam.training.optimizer import build_optimizer
from usam.training.usam import SegmentationStep


class Case(NamedTuple):
    """One comparison: size of the input, batch, slices an epoch, our precision."""

    size: int
    batch: int
    images: int
    ours: str

    def __str__(self) -> str:
        return f"{self.ours} / float32, {self.size} x {self.size}, batch {self.batch}"


ON_CPU = Case(112, 8, 32, "bfloat16")
ON_GPU = Case(224, 24, 960, "bfloat16")
QUICK = Case(32, 2, 4, "bfloat16")


def epochs(case: Case, workers: int, options: argparse.Namespace) -> Row:
    """An epoch from disk, ours and the plain loop's."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = build_usam(options.sam_model, CLASSES, case.size).to(device)
    plain, precision = plain_twin(model, options.sam_model), precision_of(case.ours, device)
    optimizer = build_optimizer(model.parameter_groups(1e-4, 1e-5, 1e-5), 1e-4)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=1e-4)
    with tempfile.TemporaryDirectory() as name:
        write_slices(Path(name), case.images, side=2 * case.size)
        store = SliceStore(Path(name) / "store")
        data = SliceDataset(store, store.slices("test"), img_size=case.size)
        loader = loader_for(
            data, workers, batch_sampler=TrainingBatches(len(data), case.batch, seed=0)
        )
        files = DataLoader(
            PlainSlices(Path(name) / "npz", case.size, training=True), case.batch, shuffle=True,
            num_workers=workers, persistent_workers=workers > 0,
        )  # fmt: skip
        ours = partial(
            engine.train_one_epoch, model, loader, step=SegmentationStep(device, augment),
            recipe=engine.Recipe(seed=0, total_samples=10**9), precision=precision,
        )  # fmt: skip
        pairs = harness.paired_seconds(
            lambda: ours(fresh_state(model, optimizer, precision)),
            lambda: plain_steps(plain, theirs, files),
            rounds=options.rounds, device=device,
        )  # fmt: skip
    row = Row(f"precision: training from disk, {case}, {workers} workers")
    return harness.compared(row, pairs, case.images, "images/s")


def stall(options: argparse.Namespace) -> Row:
    """Seconds training waits for a save, against saving in its own thread."""
    device = torch.device(options.device)
    model = build_usam(options.sam_model, CLASSES, 224).to(device)
    optimizer = build_optimizer(model.parameter_groups(1e-4, 1e-5, 1e-5), 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saver = CheckpointWriter(folder)
        pairs = []
        for _ in range(2 * options.rounds):
            waited = harness.seconds(lambda: saver.submit({folder / "last.pth": state}), device)
            saver.wait()  # written, before the disk is asked for more
            pairs.append((waited, harness.seconds(lambda: plain_save(state, folder), device)))
    ours, theirs = ([1000 * t for t in times] for times in zip(*pairs, strict=True))
    return Row(
        f"a save holds training up, {options.sam_model} with its optimizer", "",
        f"{harness.spread(ours, 0)} ms", f"{harness.spread(theirs, 0)} ms",
        harness.spread([b / a for a, b in pairs], 1),
    )  # fmt: skip


def plain_save(state: dict, folder: Path) -> None:
    """torch.save, and the bytes on the disk."""
    with open(folder / "plain.pth", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--num_workers", type=int, nargs="+", help="of both loaders")
    options = parser.parse_args()
    options.sam_model = "vit_tiny" if options.quick else "vit_b"
    options.rounds = 1 if options.quick else options.rounds
    harness.set_up(options)
    on_gpu = options.device.startswith("cuda")
    case = QUICK if options.quick else ON_GPU if on_gpu else ON_CPU
    workers = options.num_workers or ([0, 2, 8, 16] if on_gpu else [2])
    if options.unmeasured:
        titles = [f"precision: training from disk, {case}, {n} workers" for n in workers]
        print(harness.table([Row(title) for title in [*titles, "a save holds training up"]]))
        return
    rows = [*(epochs(case, number, options) for number in workers), stall(options)]
    print(f"From disk; {harness.machine(torch.device(options.device))}\n")
    print(harness.table(rows))


if __name__ == "__main__":
    main()
