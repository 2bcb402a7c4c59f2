"""Checkpoints of a run: written whole or not at all, and everything they restore.

`usam.run_folder` saves through this file; `usam.weights` reads what it wrote.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.files import atomic_write

FAILED_SAVES = 3  # in a row, after which training stops


def save(path: Path, state: Mapping[str, Any], *, keep: int = 0) -> None:
    """Write `state` to `path` so that `path` always holds a whole checkpoint, old or new.

    The bytes go to a temporary file in the same folder, reach the disk, then take the name.
    `keep` predecessors stay, see `predecessor`; what goes, goes after the new file is on the disk.
    Raises OSError naming the path; the old file and no temporary one remain in that case.
    """
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(dict(state), file)
            if keep:
                hold(path, old)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as the latter
        with contextlib.suppress(OSError):  # a folder that has become read-only
            old.unlink(missing_ok=True)
        where = f"{path}{space_beside(path)}"
        raise OSError(f"could not save {where}: {reason_of(error)}") from error
    try:
        retire(path, old, keep)
    except OSError as error:
        print(f"warning: an older {path.name} stays where it is: {error}", flush=True)


def reason_of(error: BaseException) -> str:
    """What the disk said, where torch's zip writer hides it behind an error of its own."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return str(found or error)


def space_beside(path: Path) -> str:
    """How much is free where a save failed, as a part of a sentence, if that can be told."""
    try:
        return f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free there)"
    except OSError:
        return ""


def predecessor(path: Path, number: int) -> Path:
    """What the file `path` was `number` saves ago: last.1.pth, last.2.pth, ... for last.pth."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def predecessors(path: Path) -> list[Path]:
    """Those of `path` that are there, the newest first."""
    names = path.parent.glob(f"{path.stem}.*{path.suffix}")
    known = [name for name in names if 0 < number_of(path, name) < 10**6]
    return sorted(known, key=lambda name: number_of(path, name))


def number_of(path: Path, file: Path) -> int:
    """How many saves ago `file` was `path`, by its name; 0 for a name of another kind."""
    digits = file.name[len(path.stem) + 1 : -len(path.suffix)]
    return int(digits) if re.fullmatch(r"[1-9][0-9]{0,5}", digits) else 0


def hold(path: Path, name: Path) -> None:
    """Give the file at `path`, if there is one, a second name; warns where that cannot be."""
    try:
        name.unlink(missing_ok=True)
        os.link(path, name)
    except FileNotFoundError:
        return
    except OSError as error:  # a file system without hard links
        print(f"warning: no predecessor of {path.name} is kept: {error}", flush=True)


def retire(path: Path, old: Path, keep: int) -> None:
    """Move the predecessors of `path` one on, `old` becoming the newest; delete all but `keep`.

    Raises OSError where a file can be neither moved nor deleted.
    """
    numbered = {number_of(path, file): file for file in predecessors(path)}
    if old.exists():
        for number in sorted(numbered, reverse=True):
            if number < keep:
                os.replace(numbered[number], predecessor(path, number + 1))
        os.replace(old, predecessor(path, 1))
    for number, file in numbered.items():
        if number > keep:
            file.unlink(missing_ok=True)


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


def to_cpu(state: Any, copies: dict[int, torch.Tensor] | None = None) -> Any:
    """A copy of nested dicts and lists whose tensors lie in memory of their own on the CPU.

    A tensor met twice, as the weights of best.pth and last.pth are, is copied once. `copies`:
    the copies made so far, by the identity of what they are copies of.
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


class BackgroundSaver:
    """Saves in a thread, so that training waits for the copy off the device and no longer.

    A caller whose save may wait for the next occasion asks `is_due` first; `submit` waits its
    turn. A failed write is reported and tried again with the next save, unless that brings a newer
    state for the same file; the third failure in a row raises. keep: see `save`.
    """

    def __init__(self, keep: int = 0) -> None:
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._started = self._ended = time.monotonic()
        self._unwritten: dict[str, Mapping[str, Any]] = {}
        self._failures = 0
        self._error: OSError | None = None

    @property
    def is_due(self) -> bool:
        """Whether nothing is being written and writing took no more than a tenth of the time."""
        if self._thread is not None and self._thread.is_alive():
            return False
        return time.monotonic() - self._ended >= 9 * (self._ended - self._started)

    def submit(self, files: Mapping[Path, Mapping[str, Any]]) -> None:
        """Write each state to its path, in order, after any write under way has ended."""
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
            if self._failures >= FAILED_SAVES:
                raise error
            print(f"warning: {error}; training goes on and tries again", flush=True)

    def finish(self) -> None:
        """Return when everything submitted is on the disk; raises OSError where it cannot be."""
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
