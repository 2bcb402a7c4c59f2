"""Evaluation in 1 to 4 real processes counts every sample once, for every number of samples.

Each world is made of forked processes that join by gloo and evaluate as u-sam.py does.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.helpers.toy import FLOAT32, SIDE, Slices, Toy
from tests.stress.injector import in_a_child, wait_for
from tests.stress.rows import Row
from usam.evaluation.pixels import count_pixels
from usam.runtime import processes
from usam.runtime.loaders import evaluation_loader

BATCH = 3
WORLDS = (1, 2, 3, 4)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def join(rank: int, world: int, port: int) -> None:
    """Make this process one of `world` that meet at `port`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes.start("cpu")


def counted(numbers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Confusion matrices (2, C, C) of a network on so many slices, as this process ends up with."""
    torch.manual_seed(0)
    model, found = Toy(), {}
    for number in numbers:
        loader = evaluation_loader(Slices(number), num_workers=0, batch_size=BATCH)
        counts = count_pixels(model, loader, prompt_mode=1, precision=FLOAT32)
        found[number] = counts.tensors.clone()
    return found


def in_worlds(numbers: Sequence[int], world: int, folder: Path) -> list[dict[int, torch.Tensor]]:
    """What every process of a world counted; world 0 is one process that joins nobody."""
    port = free_port()

    def process(rank: int) -> None:
        if world:
            join(rank, world, port)
        torch.save(counted(numbers), folder / f"{world}-{rank}.pt")
        processes.stop()

    ranks = range(max(world, 1))
    log = folder / "log"
    children = [in_a_child(lambda rank=rank: process(rank), log=log) for rank in ranks]
    codes = [wait_for(child) for child in children]
    if any(codes):
        raise RuntimeError(
            f"a process of {world} ended with {codes}: {log.read_text(encoding='utf-8')[-2000:]}"
        )
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in ranks]


def run_counts(numbers: Sequence[int], worlds: Sequence[int] = WORLDS) -> Row:
    """Every number of samples in every world against one process that joins nobody."""
    started, row = time.monotonic(), Row("counts", "evaluations equal to one process alone", 0)
    with tempfile.TemporaryDirectory() as folder:
        (alone,) = in_worlds(numbers, 0, Path(folder))
        for world in worlds:
            found = in_worlds(numbers, world, Path(folder))
            for number in numbers:
                row.number += 1
                pixels = int(alone[number][0].sum())
                if pixels != number * SIDE**2:
                    row.faults.append(f"{number} samples alone count {pixels} pixels")
                elif not all(torch.equal(of_rank[number], alone[number]) for of_rank in found):
                    row.faults.append(f"{number} samples in {world} processes")
    row.note = f"N = {numbers[0]}..{numbers[-1]} x world {worlds[0]}..{worlds[-1]}, gloo"
    row.seconds = time.monotonic() - started
    return row


def run(*, full: bool) -> list[Row]:
    """The figures of this part: N = 1..64 in worlds of 1 to 4, or N = 1..9."""
    return [run_counts(range(1, 65) if full else range(1, 10))]
