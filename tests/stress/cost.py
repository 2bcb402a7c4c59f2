"""What safety costs: a durable save, the copy it waits for, the guards of a step, the stop flag.

Times are medians of alternating runs in one process; figures are shares, so that they travel.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.stress.counts import free_port, join
from tests.stress.injector import in_a_child, wait_for
from tests.stress.rows import Row
from usam.models.usam import USam, build_usam
from usam.runtime import processes
from usam.runtime.signals import StopRequest
from usam.training import checkpoint
from usam.training.checkpoint import CheckpointWriter, to_cpu
from usam.training.epoch_sums import FiniteGuard
from usam.training.losses import segmentation_loss
from usam.training.optimizer import build_optimizer

MAX_SAVE = 1.1  # times torch.save and fsync
MAX_GUARD = 0.01  # of a step
MAX_STALL = 1.1  # times the copy, and SPARE seconds for the thread
SPARE = 0.01
MAX_FLAG = 1.0  # seconds until every process knows that one was asked to stop


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes once."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternating(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int
) -> tuple[float, float]:
    """Median seconds of both, run in the order A B B A, after one run of each to warm up."""
    first()
    second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for place in (0, 1, 1, 0):
            times[place].append(seconds((first, second)[place]))
    return statistics.median(times[0]), statistics.median(times[1])


def whole_state(sam_model: str) -> dict[str, Any]:
    """Weights and optimizer of a real network after one step, as a checkpoint holds them."""
    model = build_usam(sam_model, num_classes=3, img_size=64)
    optimizer = build_optimizer(model.parameter_groups(1e-3, 1e-4, 1e-4), 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def save_simply(path: Path, state: dict[str, Any]) -> None:
    """torch.save and fsync, over the old file: what a durable save is compared with."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def run_saves(sam_model: str, rounds: int) -> list[Row]:
    """A durable save against torch.save and fsync; what training waits for against the copy."""
    state, rows = whole_state(sam_model), []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain, durable = alternating(
            lambda: save_simply(folder / "plain.pth", state),
            lambda: checkpoint.save(folder / "last.pth", state, keep=1),
            rounds,
        )
        size = (folder / "last.pth").stat().st_size / 1e6
        rows.append(limited("a durable save / torch.save + fsync", durable / plain, MAX_SAVE))
        rows[-1].note += f"; {size:.0f} MB, {durable:.2f} s and {plain:.2f} s"
        saver, stalls, copies = CheckpointWriter(folder), [], []
        for _ in range(max(3, rounds)):
            copies.append(seconds(lambda: to_cpu(state)))
            stalls.append(seconds(lambda: saver.submit({folder / "last.pth": state})))
            saver.wait()
        stall, copy = statistics.median(stalls), statistics.median(copies)
        limit = MAX_STALL + SPARE / copy
        rows.append(limited("time training waits for a save / its copy", stall / copy, limit))
    rows[-1].seconds = time.monotonic() - started
    return rows


def limited(what: str, figure: float, limit: float) -> Row:
    """A row that is good if the figure is at most the limit."""
    row = Row("cost", what, 1, note=f"{figure:.4g} (at most {limit:.4g})")
    if figure > limit:
        row.faults.append(f"{figure:.4g} is above {limit:.4g}")
    return row


def run_guards(sam_model: str, *, img_size: int, batch_size: int, steps: int) -> Row:
    """The finite check and the question for a stop, against a whole training step."""
    started, model = time.monotonic(), build_usam(sam_model, num_classes=3, img_size=img_size)
    optimizer = build_optimizer(model.parameter_groups(1e-3, 1e-4, 1e-4), 1e-4)
    shape = (batch_size, img_size, img_size)
    batch = torch.rand(shape)[:, None], torch.randint(3, shape)
    guard = FiniteGuard(model, torch.device("cpu"))
    guards: list[float] = []
    with StopRequest() as stop:
        stop.watch()

        def guarded() -> None:
            guard.check(optimizer)
            stop.asked()

        step = statistics.median(
            seconds(lambda: train_step(model, optimizer, batch, guards=guards, guarded=guarded))
            for _ in range(steps)
        )
    share = statistics.median(guards) / step
    what = f"guards / step ({sam_model}, {img_size} px, batch {batch_size})"
    row = limited(what, share, MAX_GUARD)
    row.note += f"; {1000 * statistics.median(guards):.2f} ms of {step:.2f} s"
    row.seconds = time.monotonic() - started
    return row


def train_step(
    model: USam,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    *,
    guards: list[float],
    guarded: Callable[[], None],
) -> None:
    """One step with its guards, whose seconds are added to `guards`."""
    image, mask = batch
    segmentation_loss(model(image), mask).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    guards.append(seconds(guarded))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def run_flag(trials: int) -> Row:
    """Seconds from a signal to one of two processes until the other knows, at several paces."""
    started = time.monotonic()
    row = Row("cost", "stop flags that reached the other process within a second", 0)
    slowest = 0.0
    for pace in (0.002, 0.05, 0.4):
        for trial in range(trials):
            row.number += 1
            delay = told_after(pace, steps=round((0.3 + 0.37 * trial) / pace))
            slowest = max(slowest, delay)
            if delay > MAX_FLAG:
                row.faults.append(f"{delay:.2f} s at steps of {pace} s")
    row.note, row.seconds = f"slowest {slowest:.2f} s", time.monotonic() - started
    return row


def told_after(pace: float, steps: int) -> float:
    """Seconds until rank 0 knows that rank 1 was signalled at its step `steps`, of `pace` each."""
    with tempfile.TemporaryDirectory() as scratch:
        port, folder = free_port(), Path(scratch)

        def process(rank: int) -> None:
            join(rank, 2, port)
            with StopRequest() as stop:
                stop.watch()
                for step in range(10**9):
                    time.sleep(pace)
                    if step == steps and rank == 1:
                        (folder / "sent").write_text(f"{time.time()}", encoding="utf-8")
                        os.kill(os.getpid(), signal.SIGTERM)
                    if stop.asked():
                        break
            (folder / f"knows-{rank}").write_text(f"{time.time()}", encoding="utf-8")
            processes.stop()

        log = folder / "log"
        children = [in_a_child(lambda rank=rank: process(rank), log=log) for rank in (0, 1)]
        codes = [wait_for(child) for child in children]
        if any(codes):
            raise RuntimeError(
                f"processes ended with {codes}: {log.read_text(encoding='utf-8')[-1000:]}"
            )
        return float((folder / "knows-0").read_text(encoding="utf-8")) - float(
            (folder / "sent").read_text(encoding="utf-8")
        )


def run(*, full: bool) -> list[Row]:
    """The figures of this part; without `full` the flag alone, as times vary on busy machines."""
    if not full:
        return [run_flag(1)]
    return [
        run_flag(4),
        *run_saves("vit_tiny", 5),
        run_guards("vit_tiny", img_size=112, batch_size=2, steps=10),
    ]
