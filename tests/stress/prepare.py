"""Preparing over an older store, interrupted: the folder has the old store or the new one, whole.

A forked process prepares with the project's own command, over a store of other options. It is
killed, its disk is full, or a second run starts, at an operation or a time drawn at random.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel as nib
import numpy as np

from dataset.prepare.command import main as prepare
from dataset.verify.command import verify
from tests.stress.injector import Injector, Moment, in_a_child, kill_self, raising, wait_for
from tests.stress.rows import Row
from tests.stress.saves import moments

CASES = 3
SHARE_BY_TIME = 0.2  # of the kills: at a random time rather than at a chosen operation
OLD = ("--window", "-160", "240", "--seed", "1")
NEW = ("--window", "-500", "1300", "--seed", "2", "--test_fraction", "0.34", "--folds", "2")
OTHER = ("--window", "0", "80", "--spacing", "3")
FULL = OSError(28, "No space left on device")


def write_source(folder: Path) -> None:
    """A few small scans with labels of two classes."""
    draw = np.random.default_rng(0)
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    for number in range(CASES):
        image = draw.integers(-300, 500, (14, 12, 3)).astype(np.int16)
        label = (image > 200).astype(np.uint8) + (image > 350)
        for kind, array in (("images", image), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), folder / kind / f"case{number}.nii")


def run_prepare(source: Path, store: Path, options: tuple[str, ...]) -> int:
    """Exit code of `python -m dataset.prepare folder` in this process, without its output."""
    flags = ["folder", "--input", str(source), "--output", str(store), "--workers", "1", *options]
    with silent():
        return prepare(flags)


@contextmanager
def silent() -> Iterator[None]:
    """A context whose output is not shown."""
    null = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    with null, redirect_stdout(null), redirect_stderr(null):
        yield


def errors_in(store: Path) -> list[str]:
    """What `python -m dataset.verify` calls an error."""
    with silent():
        return [finding.what for finding in verify(store)[1] if finding.level == "error"]


def content(store: Path) -> str:
    """Digest of the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(store.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(store)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class Trial:
    """Stores of three options, and one folder in which they replace each other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "source"
        write_source(self.source)
        self.whole = {}
        for name, options in (("old", OLD), ("new", NEW), ("other", OTHER)):
            assert run_prepare(self.source, folder / name, options) == 0
            self.whole[content(folder / name)] = name
        assert len(self.whole) == 3
        self.store = folder / "data" / "store"

    def reset(self) -> None:
        """Puts the old store back and removes everything beside it."""
        shutil.rmtree(self.store.parent, ignore_errors=True)
        shutil.copytree(self.folder / "old", self.store)

    def operations(self) -> list[tuple[str, int]]:
        """Name and length of every file operation of a run over the old store."""
        self.reset()
        watcher = self._injector(None, lambda: None)
        with watcher.watching():
            assert run_prepare(self.source, self.store, NEW) == 0
        return [(operation.name, len(operation.data)) for operation in watcher.seen]

    def _injector(self, at: Moment | None, act: Callable[[], None]) -> Injector:
        below = str(self.store.parent)
        return Injector(at, act, only=lambda path: os.path.abspath(path).startswith(below))

    def interrupt(self, how: str, at: Moment | None, delay: float) -> str:
        """What is wrong after one interrupted run, or ""."""
        self.reset()
        acts = {"killed": kill_self, "full": raising(FULL), "second": self._second_run}

        def work() -> None:
            with self._injector(at, acts[how]).watching():
                raise SystemExit(run_prepare(self.source, self.store, NEW))

        child = in_a_child(work, log=self.folder / "log")
        if at is None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        code = wait_for(child)
        found = self.whole.get(content(self.store), "a mixture")
        if found not in ("old", "new") or (code == 0 and found != "new"):
            return f"ended with {code}: the folder has {found}"
        if how == "second" and code != 0:
            return f"a second run ended the first with {code}"
        if errors := errors_in(self.store):
            return f"verify: {errors[0]}"
        if run_prepare(self.source, self.store, NEW) != 0:
            return "the next run failed"
        found = self.whole.get(content(self.store), "a mixture")
        left = [path.name for path in self.store.parent.iterdir() if path != self.store]
        return "" if found == "new" and not left else f"the next run: {found}, left {left}"

    def _second_run(self) -> None:
        """A run of other options beside this one; it must be refused, but before or after it."""
        code = wait_for(in_a_child(self._other, log=self.folder / "log"))
        assert code in (0, 2), f"the second run ended with {code}"

    def _other(self) -> None:
        raise SystemExit(run_prepare(self.source, self.store, OTHER))


def run_interruptions(number: int, seed: int = 0) -> Row:
    """`number` runs, each interrupted once: killed, without space, or met by a second run."""
    row = Row("prepare", "interrupted runs over an older store: old or new, whole", number)
    draw, started = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch))
        operations = trial.operations()
        shares = {"full": number // 3, "second": number // 6}
        shares["killed"] = number - sum(shares.values())
        by_time = round(shares["killed"] * SHARE_BY_TIME)
        plans: list[tuple[str, Moment | None]] = [("killed", None)] * by_time
        for how, share in shares.items():
            places = list(moments(operations, 10_000, draw.randrange(1000)))
            if how == "second":  # at operations, not within writes
                places = [place for place in places if place.place != "within"]
            count = share - by_time if how == "killed" else share
            plans += [(how, place) for place in draw.choices(places, k=count)]
        for how, at in plans:
            wrong = trial.interrupt(how, at, draw.uniform(0, 0.15))
            if wrong:
                row.faults.append(f"{how} {at}: {wrong}")
    row.note = ", ".join(f"{share} {how}" for how, share in shares.items())
    row.seconds = time.monotonic() - started
    return row


def run_mixtures(number: int, seed: int = 0) -> Row:
    """`number` stores with files of another store put in by hand; verify must find each."""
    row = Row("prepare", "mixtures of two stores that verify finds", number)
    draw, started = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch))
        old, new = trial.folder / "old", trial.folder / "new"
        names = [path.relative_to(old) for path in sorted(old.rglob("*")) if path.is_file()]
        names = [name for name in names if (old / name).read_bytes() != (new / name).read_bytes()]
        for _ in range(number):
            planted = draw.sample(names, draw.randrange(1, len(names)))
            trial.reset()
            for name in planted:
                shutil.copy(new / name, trial.store / name)
            if not errors_in(trial.store):
                row.faults.append(f"not found: {', '.join(map(str, planted))}")
    row.seconds = time.monotonic() - started
    return row


def run(*, full: bool) -> list[Row]:
    """The figures of this part: 500 interruptions and 200 mixtures, or a sample of both."""
    return [run_interruptions(500 if full else 60), run_mixtures(200 if full else 30)]
