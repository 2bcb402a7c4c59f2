"""Kills and power cuts during a save: last.pth is readable afterwards, one save lost at most.

A forked process saves a small state with the project's own functions; the parent reads what is left
with the project's own reader.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers.toy import FLOAT32, Toy, one_group
from tests.stress.injector import Injector, Moment, Operation, in_a_child, kill_self, wait_for
from tests.stress.rows import Row
from usam.training import checkpoint
from usam.training.checkpoint import CheckpointWriter, Progress
from usam.training.run_folder import remove_unfinished
from usam.weights.checkpoint_parts import FORMAT
from usam.weights.usam import read_checkpoint

SAVES_BY_TIME = 6  # that a child makes before it ends by itself
SHARE_BY_TIME = 0.2  # of the kills: at a random time rather than at a chosen operation
Saver = Callable[[Path, int, Callable[[int], None]], None]

Names = dict[str, "Inode"]
UNSYNCED: tuple[Callable[[bytes, bytes], bytes], ...] = (  # what becomes of (synced, written)
    lambda synced, written: synced,
    lambda synced, written: written[: len(written) // 2],
    lambda synced, written: bytes(len(written)),
    lambda synced, written: written,
)


@dataclass(eq=False)
class Inode:
    """A file's bytes: as written so far, and as they were when it was last synced."""

    written: bytes = b""
    synced: bytes = b""


def disks(
    before: dict[str, bytes], journal: Sequence[Operation], folder: Path
) -> Iterator[dict[str, bytes]]:
    """Every folder, by file name, that a power cut after `journal` may leave of `before`.

    Bytes reach the disk for certain with the file's fsync, names with the folder's; before that
    any of the renames may have happened, in their order, and any of UNSYNCED to the bytes.
    """
    start = {name: Inode(content, content) for name, content in before.items()}
    steps: list[Names] = [dict(start)]  # the names after each change since the last folder fsync
    for operation in journal:
        names, name = dict(steps[-1]), Path(operation.path).name
        if operation.name == "open":
            names[name] = Inode()
            steps.append(names)
        elif operation.name == "write":
            names[name].written += operation.data
        elif operation.name == "fsync" and Path(operation.path) == folder:
            steps = [names]
        elif operation.name == "fsync":
            names[name].synced = names[name].written
        elif operation.name in ("replace", "rename"):
            names[Path(operation.other).name] = names.pop(name)
            steps.append(names)
        elif operation.name == "link":
            names[Path(operation.other).name] = names[name]
            steps.append(names)
        else:  # unlink and remove
            names.pop(name, None)
            steps.append(names)
    for names in steps:
        for fate in UNSYNCED:
            yield {
                name: inode.written
                if inode.written == inode.synced
                else fate(inode.synced, inode.written)
                for name, inode in names.items()
            }


def small_model(number: int) -> Toy:
    """A network whose every weight is `number`, some of them mere ballast."""
    model = Toy()
    model.register_buffer("ballast", torch.zeros(8192))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(number)
    return model


def small_state(number: int) -> dict[str, Any]:
    """A whole checkpoint whose every weight and sample count is `number`; about 60 kB."""
    model = small_model(number)
    return {
        "format": FORMAT,
        "model": model.state_dict(),
        "args": {"model": "u-sam"},
        "data": {},
        "progress": vars(Progress(samples=number)),
        "best": {"epoch": None, "mean_dice": None},
        "optimizer": one_group(model).state_dict(),
        "scaler": FLOAT32.scaler().state_dict(),
        "rng": checkpoint.random_state(),
    }


def save_plainly(folder: Path, number: int, done: Callable[[int], None]) -> None:
    """Save `number` with checkpoint.save alone."""
    checkpoint.save(folder / "last.pth", small_state(number))
    done(number)


def save_as_a_run(folder: Path, number: int, done: Callable[[int], None]) -> None:
    """Save `number` as an epoch's end does: best.pth, last.pth, their backups, from a thread."""
    writer = CheckpointWriter(folder, keep=1)
    writer.save(lambda: small_state(number), as_best=True, may_skip=False)
    writer.finish()
    done(number)


SAVERS: tuple[Saver, ...] = (save_plainly, save_as_a_run)


def operations_of(save: Saver) -> list[tuple[str, int]]:
    """Name and length of every file operation of one save over an older one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, watcher = Path(scratch), Injector(only=lambda path: path.startswith(scratch))
        save(folder, 0, lambda _: None)
        with watcher.watching():
            save(folder, 1, lambda _: None)
    return [(operation.name, len(operation.data)) for operation in watcher.seen]


def moments(operations: list[tuple[str, int]], number: int, seed: int) -> Iterator[Moment]:
    """`number` moments of a save: before and after every operation, then random bytes of writes."""
    fixed = [Moment(n, place) for n in range(len(operations)) for place in ("before", "after")]
    yield from fixed[:number]
    draw = random.Random(seed)
    writes = [(n, length) for n, (name, length) in enumerate(operations) if name == "write"]
    for _ in range(number - len(fixed)):
        place, length = draw.choices(writes, [length for _, length in writes])[0]
        yield Moment(place, "within", draw.randrange(length))


def saver_child(folder: Path, save: Saver, first: int, *, at: Moment | None, pipe: int) -> None:
    """Save first, first + 1, ... telling each end to `pipe`; killed at a moment of the second."""

    def tell(number: int) -> None:
        os.write(pipe, number.to_bytes(4, "little"))

    if at is None:
        for number in range(first, first + SAVES_BY_TIME):
            save(folder, number, tell)
        return
    save(folder, first, tell)
    with Injector(at, kill_self, only=lambda path: path.startswith(str(folder))).watching():
        save(folder, first + 1, tell)


def kill_once(
    folder: Path, save: Saver, first: int, *, at: Moment | None, delay: float
) -> tuple[bool, int, str]:
    """(killed, the number that last.pth holds, what is wrong or "") after one kill."""
    reader, writer = os.pipe()
    child = in_a_child(lambda: saver_child(folder, save, first, at=at, pipe=writer))
    os.close(writer)
    try:
        if at is None:
            os.read(reader, 4)  # the first is saved
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        code = wait_for(child)
        told = b""
        while part := os.read(reader, 1 << 16):
            told += part
    finally:
        os.close(reader)
    done = int.from_bytes(told[-4:], "little") if told else first
    try:
        state = read_checkpoint(folder / "last.pth")
    except (ValueError, OSError) as error:
        return True, done, f"not readable: {error}"
    found = state["progress"]["samples"]
    whole = all(bool((value == found).all()) for value in state["model"].values())
    if not whole:
        return True, found, "weights of two saves in one file"
    if found not in (done, done + 1):
        return True, found, f"save {done} was finished, last.pth holds {found}"
    if code not in (0, -signal.SIGKILL):
        return False, found, f"the saver ended with {code}, not by the kill"
    return code == -signal.SIGKILL, found, ""


def run_kills(number: int, seed: int = 0) -> Row:
    """`number` kills in turns over SAVERS; every one must hit, leave a whole file and lose one."""
    row = Row("saves", "kills while saving that leave a readable last.pth", number)
    draw, started = random.Random(seed), time.monotonic()
    by_time = round(number * SHARE_BY_TIME)
    share = (number - by_time) // 2
    plans: list[tuple[Saver, Moment | None]] = [(SAVERS[n % 2], None) for n in range(by_time)]
    for save, count in zip(SAVERS, (share, number - by_time - share), strict=True):
        plans += [(save, at) for at in moments(operations_of(save), count, seed)]
    with tempfile.TemporaryDirectory() as scratch:
        folder, current, hits = Path(scratch), 1, 0
        for save, at in plans:
            delay = draw.uniform(0, 0.02)
            while True:  # a kill may come too late; such a try counts for nothing
                killed, current, wrong = kill_once(folder, save, current + 1, at=at, delay=delay)
                if killed or wrong:
                    break
                delay /= 2
                at = at and at._replace(number=at.number - 1)
            hits += killed
            if wrong:
                row.faults.append(f"{save.__name__} {at}: {wrong}")
                folder = Path(tempfile.mkdtemp(dir=scratch))
        row.faults += left_behind(folder, current)
    row.note = f"{hits} hit; {by_time} at random times"
    row.seconds = time.monotonic() - started
    return row


def left_behind(folder: Path, current: int) -> list[str]:
    """Faults of the folder after all kills: the next run's save leaves its files and no other."""
    remove_unfinished(folder)
    save_as_a_run(folder, current + 1, lambda _: None)
    known = {f"{name}{number}.pth" for name in ("last", "best") for number in ("", ".1")}
    others = {path.name for path in folder.iterdir()} - known
    return [f"left behind: {', '.join(sorted(others))}"] if others else []


def run_power_cuts(saves: int = 3) -> Row:
    """Every disk a power cut may leave at any operation of some saves: last.pth is readable."""
    row, started = Row("saves", "power cuts (lost pages and names) survived", 0), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as disk:
        folder = Path(scratch)
        for save in SAVERS:
            save(folder, 0, lambda _: None)
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            watcher = Injector(only=lambda path: path.startswith(scratch))
            ends = [0]  # operations done when each save had returned
            with watcher.watching():
                for number in range(1, saves + 1):
                    save(folder, number, lambda _: None)
                    ends.append(len(watcher.seen))
            for cut in range(len(watcher.seen) + 1):
                finished = sum(end <= cut for end in ends) - 1
                for content in disks(before, watcher.seen[:cut], folder):
                    row.number += 1
                    wrong = after_power_cut(Path(disk), content, finished)
                    if wrong:
                        row.faults.append(f"{save.__name__}, cut after operation {cut}: {wrong}")
    row.seconds = time.monotonic() - started
    return row


def after_power_cut(disk: Path, content: dict[str, bytes], finished: int) -> str:
    """What is wrong with the last.pth of a folder's content, or ""."""
    if "last.pth" not in content:
        return "no last.pth"
    path = disk / "last.pth"
    path.write_bytes(content["last.pth"])
    try:
        found = read_checkpoint(path)["progress"]["samples"]
    except (ValueError, OSError) as error:
        return f"not readable: {error}"
    if found not in (finished, finished + 1):
        return f"save {finished} was finished, last.pth holds {found}"
    return ""


def run(*, full: bool) -> list[Row]:
    """The figures of this part: 2,000 kills and every power cut, or a sample of the kills."""
    return [run_kills(2000 if full else 120), run_power_cuts()]
