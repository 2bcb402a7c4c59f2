"""Checkpoints of a run: their content, and writing them atomically."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset.files import atomic_write
from usam.runtime.processes import is_main
from usam.training.ema import WeightAverage
from usam.weights.checkpoint_parts import FORMAT
from usam.weights.inference import averaged
from usam.weights.small_checkpoint import without_base

MAX_FAILED_SAVES = 3  # in a row, after which training stops
ONLY_TO_RESUME = ("optimizer", "scaler", "rng", "in_epoch", "unvalidated")  # not in best.pth


# ------------------------------------------------------------------ what a checkpoint holds


@dataclass
class Progress:
    """Progress of a training: the next epoch, the next step in it, samples seen by all ranks.

    skipped_in_a_row: how many of the last steps were skipped, across epochs.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    skipped_in_a_row: int = 0


class TrainingState:
    """Everything that training changes, and so everything a checkpoint needs to resume a run.

    model: the plain module. average: of its weights, perhaps with decay 0. facts: what the run is
    made from, see `manifest.facts_of`. best: epoch and score of the best epoch so far. in_epoch:
    the sums of an epoch that was stopped before its end. unvalidated: the figures of an epoch that
    is trained, but not yet validated.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        average: WeightAverage,
        facts: Mapping[str, Any],
    ) -> None:
        self.model, self.optimizer, self.scaler, self.average = model, optimizer, scaler, average
        self.facts = facts
        self.progress = Progress()
        self.best: dict[str, Any] = {"epoch": None, "mean_dice": None}
        self.in_epoch: dict[str, Any] | None = None
        self.unvalidated: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The content of last.pth: enough to resume exactly, and to predict without the flags."""
        weights, data = self.model.state_dict(), dict(self.facts["data"])
        state = {
            "format": FORMAT,
            "model": without_base(weights) if data.get("base") else weights,
            "args": dict(self.facts["arguments"]),
            "data": data,
            "progress": asdict(self.progress),
            "best": dict(self.best),
            "manifest": {k: v for k, v in self.facts.items() if k not in ("arguments", "data")},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": random_state(),
        }
        state |= {"average": self.average.state_dict()} if self.average.weights else {}
        state |= {"in_epoch": dict(self.in_epoch)} if self.in_epoch else {}
        return state | ({"unvalidated": dict(self.unvalidated)} if self.unvalidated else {})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue where `saved`, the content of a last.pth, was saved.

        The model has its weights already: a task builds it with them. Learning rates and weight
        decay are this run's. Raises ValueError, LookupError, TypeError, AttributeError,
        RuntimeError or OverflowError for malformed content, see `checkpoint_errors`.
        """
        rates = [(group["base_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, (rate, decay) in zip(self.optimizer.param_groups, rates, strict=True):
            group.update(base_lr=rate, weight_decay=decay)
        if saved["scaler"]:  # empty unless training was in float16
            self.scaler.load_state_dict(saved["scaler"])
        if self.average.weights and "average" in saved:
            self.average.load_state_dict(saved["average"])
        self.progress, self.best = Progress(**saved["progress"]), dict(saved["best"])
        self.in_epoch, self.unvalidated = saved.get("in_epoch"), saved.get("unvalidated")
        restore_random_state(saved["rng"])


@contextlib.contextmanager
def checkpoint_errors(path: Path | None):
    """Report a malformed checkpoint as a ValueError naming the file; None: other errors pass."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        if path is None:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: malformed training state ({reason:.100})") from error


def seed_generators(seed: int) -> None:
    """Seed every global random generator that `random_state` records."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global random generator, as plain types."""
    numpy_state = np.random.get_state(legacy=False)
    words_of_numpy = torch.from_numpy(numpy_state["state"]["key"].copy())
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": words_of_numpy,
            "pos": numpy_state["state"]["pos"],
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every global random generator to what `random_state` recorded."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    numpy_state = np.random.get_state(legacy=False) | {
        "state": {"key": saved["key"].numpy(), "pos": saved["pos"]},
        "has_gauss": saved["has_gauss"],
        "gauss": saved["gauss"],
    }
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


# ------------------------------------------------------------------ how it is written


def save(path: Path, state: Mapping[str, Any], *, keep: int = 0) -> None:
    """Write `state` to `path` so that `path` always holds a whole checkpoint, old or new.

    `keep` earlier versions stay, see `backup`; the oldest is deleted once the new file is on the
    disk. Raises OSError naming the path; the old file is then unchanged.
    """
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(dict(state), file)
            if keep:
                link_backup(path, old)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as the latter
        with contextlib.suppress(OSError):  # a folder that has become read-only
            old.unlink(missing_ok=True)
        where = f"{path}{free_space(path)}"
        raise OSError(f"could not save {where}: {cause(error)}") from error
    try:
        rotate_backups(path, old, keep)
    except OSError as error:
        print(f"warning: could not remove an older version of {path.name}: {error}", flush=True)


def cause(error: BaseException) -> str:
    """The operating system's error behind one that torch's zip writer raised."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return str(found or error)


def free_space(path: Path) -> str:
    """The free space beside `path` in parentheses for an error message; empty if unknown."""
    try:
        return f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB free)"
    except OSError:
        return ""


def backup(path: Path, number: int) -> Path:
    """The name of the file that `path` was `number` saves ago: last.1.pth, ... for last.pth."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def backups(path: Path) -> list[Path]:
    """The existing earlier versions of `path`, newest first."""
    names = path.parent.glob(f"{path.stem}.*{path.suffix}")
    known = [name for name in names if 0 < number_of(path, name) < 10**6]
    return sorted(known, key=lambda name: number_of(path, name))


def number_of(path: Path, file: Path) -> int:
    """How many saves ago `file` was `path`, by its name; 0 for a name of another kind."""
    digits = file.name[len(path.stem) + 1 : -len(path.suffix)]
    return int(digits) if re.fullmatch(r"[1-9][0-9]{0,5}", digits) else 0


def link_backup(path: Path, name: Path) -> None:
    """Hard-link `path`, if it exists, to `name` as a backup; warns where that is impossible."""
    try:
        name.unlink(missing_ok=True)
        os.link(path, name)
    except FileNotFoundError:
        return
    except OSError as error:  # a file system without hard links
        print(f"warning: no backup of {path.name} is kept: {error}", flush=True)


def rotate_backups(path: Path, old: Path, keep: int) -> None:
    """Renumber the backups of `path`, `old` becoming the newest; delete all but `keep`.

    Raises OSError if a file can be neither renamed nor deleted.
    """
    numbered = {number_of(path, file): file for file in backups(path)}
    if old.exists():
        for number in sorted(numbered, reverse=True):
            if number < keep:
                os.replace(numbered[number], backup(path, number + 1))
        os.replace(old, backup(path, 1))
    for number, file in numbered.items():
        if number > keep:
            file.unlink(missing_ok=True)


def to_cpu(state: Any, copies: dict[int, torch.Tensor] | None = None) -> Any:
    """A copy of nested dicts and lists, with tensors copied to the CPU.

    A tensor that occurs twice, as the weights of best.pth and last.pth do, is copied once.
    copies: those made so far, by the identity of the original.
    """
    copies = {} if copies is None else copies
    if isinstance(state, torch.Tensor):
        if id(state) not in copies:
            copies[id(state)] = state.detach().to("cpu", copy=True)
        return copies[id(state)]
    if isinstance(state, Mapping):
        return {key: to_cpu(value, copies) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [to_cpu(value, copies) for value in state]
    return state


class CheckpointWriter:
    """Writes last.pth and best.pth of a folder in a thread; training waits only for the copy.

    A failed write is reported and tried again with the next save, unless that brings a newer
    state for the same file; the third failure in a row raises OSError. keep: see `save`.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self.folder = folder
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._started = self._ended = time.monotonic()
        self._unwritten: dict[str, Mapping[str, Any]] = {}
        self._failures = 0
        self._error: OSError | None = None

    def save(self, state: Callable[[], dict[str, Any]], *, as_best: bool, may_skip: bool) -> None:
        """Save what `state` returns as last.pth and, with `as_best`, as best.pth; on rank 0.

        Returns once the state is copied. With `may_skip` nothing is saved where epochs are so
        short that writing would take more than a tenth of the time; a later one is then saved.
        """
        if not is_main() or (may_skip and not self.is_due):
            return
        last = state()
        files = {self.folder / "last.pth": last}
        if as_best:  # written first: a kill in between repeats an epoch, but never loses the best
            kept = averaged(last)
            best = {key: value for key, value in kept.items() if key not in ONLY_TO_RESUME}
            files = {self.folder / "best.pth": best, **files}
        self.submit(files)

    @property
    def is_due(self) -> bool:
        """Whether nothing is being written and writing took no more than a tenth of the time."""
        if self._thread is not None and self._thread.is_alive():
            return False
        return time.monotonic() - self._ended >= 9 * (self._ended - self._started)

    def submit(self, files: Mapping[Path, Mapping[str, Any]]) -> None:
        """Write each state to its path, in order, after any write in progress has ended."""
        self.wait()
        snapshot = to_cpu({str(path): state for path, state in files.items()})
        failed = {path: old for path, old in self._unwritten.items() if path not in snapshot}
        self._unwritten = failed | snapshot
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written; raises OSError after too many failed writes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            if self._failures >= MAX_FAILED_SAVES:
                raise error
            print(f"warning: {error}; training continues, the next save tries again", flush=True)

    def finish(self) -> None:
        """Return when everything submitted is on the disk; raises OSError if a write fails."""
        self.wait()
        if self._unwritten:
            self._write()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        self._started = time.monotonic()
        for path, state in list(self._unwritten.items()):
            try:
                save(Path(path), state, keep=self._keep)
                del self._unwritten[path]
            except OSError as error:
                self._error = error
        self._failures = self._failures + 1 if self._unwritten else 0
        self._ended = time.monotonic()
