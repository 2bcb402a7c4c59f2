"""Slices from disk to ready for the device: the slice store against npz -> CLAHE -> scipy.

    python -m benchmarks.data [--quick] [--workers 0 2 8]

Items a second on one core, decode, contrast and size included; the plain side augments in its
worker, ours on the device in the training step, whose cost a core also pays here. Then loaders
with workers, a cold and a warm start, and 33,000 slices at 512 x 512 as an index.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.plain_data import PlainSlices
from dataset.slices import SliceDataset
from dataset.store.slices import SliceStore, write_case, write_index
from dataset.transforms import augment

SIZE = 224
BATCH = 24
FIRST_STEP = r"epoch 0:[^\r\n]*\b1/\d+ \["  # the progress bar, one step done
CPU = torch.device("cpu")
COLORS = [{"id": i, "name": name, "color": "#000000"} for i, name in enumerate(("air", "a", "b"))]


def drawn_slice(seed: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture with ellipses and their labels, uint8 (side, side) each."""
    generator = np.random.default_rng(seed)
    image, mask = np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint8)
    for label in (0, 0, 0, 1, 2):
        middle = tuple(int(v) for v in generator.integers(side // 4, 3 * side // 4, 2))
        axes = tuple(int(v) for v in generator.integers(side // 10, side // 3, 2))
        cv2.ellipse(image, middle, axes, 0, 0, 360, int(generator.integers(60, 220)), -1)
        cv2.ellipse(mask, middle, axes, 0, 0, 360, label, -1)
    noise = generator.normal(0, 8, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), mask


def write_slices(folder: Path, number: int, side: int) -> None:
    """The same slices as npz files in `folder`/npz and as a store in `folder`/store."""
    (folder / "npz").mkdir(parents=True)
    drawn = [drawn_slice(seed, side) for seed in range(number)]
    for k, (image, mask) in enumerate(drawn):
        arrays = {"image": image / 255.0, "label": mask.astype(np.float64)}
        np.savez_compressed(folder / "npz" / f"slice{k:05}.npz", **arrays)
    images, masks = (np.stack(planes) for planes in zip(*drawn, strict=True))
    write_store(folder / "store", [("case0", images, masks)])


def write_store(folder: Path, cases: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """A store of (name, image, mask) test cases that asks for CLAHE."""
    entries = [
        write_case(folder, entry_of(name, len(image)), image, mask) for name, image, mask in cases
    ]
    write_index(folder, index_of(entries))


def entry_of(name: str, num_slices: int) -> dict:
    names = [f"{name}_{k:04}" for k in range(num_slices)]
    return {"id": name, "split": "test", "file": name, "slices": names, "listed": None}


def index_of(entries: list[dict]) -> dict:
    return {
        "dataset": "folder", "classes": COLORS, "window": None, "orientation": "stored",
        "clahe": True, "source": "drawn", "cases": entries,
    }  # fmt: skip


class Epoch(Dataset):
    """The training draws of a SliceDataset, by index alone."""

    def __init__(self, data: SliceDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        return self.data[index, 0]


def ours_at(folder: Path) -> Epoch:
    store = SliceStore(folder / "store")
    return Epoch(SliceDataset(store, store.slices("test"), img_size=SIZE))


def run_through(loader: DataLoader, use: Callable[[dict], object] = lambda batch: None) -> None:
    for batch in loader:
        use(batch)


def augmented(batch: dict) -> tuple[Tensor, Tensor]:
    """What the training step does with a batch before the model."""
    image, mask = batch["image"].float() / 255, batch["mask"].long()
    return augment(image, mask, torch.Generator())


def one_core(side: int, options: argparse.Namespace) -> list[Row]:
    """Loaders without workers, both sides: the worker's share, and augmentation included."""
    number = 8 if options.quick else 96
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slices(folder, number, side)
        batch = min(BATCH, number)
        ours = DataLoader(ours_at(folder), batch)
        plain = DataLoader(PlainSlices(folder / "npz", SIZE, training=True), batch)
        rows = []
        for what, use in (("ready for the device", lambda batch: None), ("augmented", augmented)):
            pairs = harness.paired_seconds(
                lambda use=use: run_through(ours, use), lambda: run_through(plain),
                rounds=options.rounds, device=CPU,
            )  # fmt: skip
            row = Row(f"one core, {side} -> {SIZE} pixels, {what}", "10x")
            rows.append(harness.compared(row, pairs, number, "items/s"))
    return rows


def with_workers(options: argparse.Namespace) -> list[Row]:
    """Our loader alone: items a second over a warm epoch, by number of workers."""
    number = 48 if options.quick else 1536
    rows = []
    with tempfile.TemporaryDirectory() as name:
        drawn = [drawn_slice(seed, 512) for seed in range(8)]
        images, masks = (np.stack(planes * (number // 8)) for planes in zip(*drawn, strict=True))
        write_store(Path(name) / "store", [("case0", images, masks)])
        for workers in options.workers:
            loader = DataLoader(
                ours_at(Path(name)), BATCH, num_workers=workers, persistent_workers=workers > 0
            )
            start = harness.seconds(lambda loader=loader: next(iter(loader)), CPU)
            took = [harness.seconds(lambda loader=loader: run_through(loader), CPU)] * 1
            rate = harness.spread([number / t for t in took], 0)
            what = f"loader alone, 512 -> {SIZE}, {workers} workers (first batch {start:.1f} s)"
            rows.append(Row(what, ours=f"{rate} items/s", baseline="-", ratio="-"))
    return rows


def large_index(options: argparse.Namespace) -> Row:
    """Opening 33,000 slices of 512 x 512: seconds, and memory it takes; arrays stay on disk."""
    cases = 10 if options.quick else 330
    entries = [
        entry_of(f"case{i:04}", 100)
        | {"shape": [100, 512, 512], "spacing": [3.0, 0.7, 0.7], "affine": None}
        | {"pixels": [[262144, 0, 0]] * 100}
        for i in range(cases)
    ]
    with tempfile.TemporaryDirectory() as name:
        write_index(name, index_of(entries))
        before, start = harness.resident_bytes(), time.perf_counter()
        data = SliceDataset(SliceStore(name), SliceStore(name).slices("test"), img_size=SIZE)
        took, grown = time.perf_counter() - start, harness.resident_bytes() - before
    found = f"{took:.2f} s, {grown / 2**20:.0f} MiB"
    return Row(f"open an index of {len(data)} slices", ours=found, baseline="-", ratio="-")


def start_of_a_run(options: argparse.Namespace) -> list[Row]:
    """`u-sam.py --help`, and a whole run of one training step on a packed phantom."""
    rows, size = [], ["--sam_model", "vit_tiny"] if options.quick else []
    with tempfile.TemporaryDirectory() as name:
        run = [
            "--dataset", "phantom", "--data_root", f"{name}/phantom", "--sam_weight", "none",
            "--img_size", "112", "--batch_size", "8", "--epochs", "1", "--device", "cpu", *size,
        ]  # fmt: skip
        for what, flags, goal in (
            ("u-sam.py --help", ["--help"], ""),
            ("cold: phantom drawn, to the end of the first step", run, ""),
            ("warm: packed store, to the end of the first step", run, "under 10 s"),
        ):
            took = seconds_to(flags, FIRST_STEP if flags is run else "usage", name)
            rows.append(Row(what, goal, f"{took:.1f} s", "-", "-"))
    return rows


def seconds_to(flags: list[str], sign: str, folder: str) -> float:
    """Seconds from the start of u-sam.py until something like `sign` is printed."""
    command = [sys.executable, "u-sam.py", *flags]
    if "--epochs" in flags:
        command += ["--output_dir", f"{folder}/run"]
    start, seen = time.perf_counter(), ""
    ours, theirs = pty.openpty()  # bars move on a terminal only, of some width
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        with suppress(OSError):  # the terminal's end
            while not re.search(sign, seen):
                seen += os.read(ours, 256).decode(errors="replace")
        took = time.perf_counter() - start
        process.terminate()
        os.close(ours)
    if not re.search(sign, seen):
        raise RuntimeError(seen[-500:])
    return took


def main() -> None:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 8])
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    options.threads = 1
    harness.set_up(options)
    if options.unmeasured:
        sides = [Row(f"one core, {side} -> {SIZE} pixels", "10x") for side in (224, 512)]
        print(harness.table([*sides, *(Row(f"loader alone, {n} workers") for n in (0, 2, 8))]))
        return
    rows = [*one_core(224, options), *one_core(512, options), *with_workers(options)]
    rows += [large_index(options), *start_of_a_run(options)]
    print(f"Data, one core a process; {harness.machine(CPU)}\n")
    print(harness.table(rows))


if __name__ == "__main__":
    main()
