"""The one injector: it sees every write, fsync and rename of a process and strikes at one of them.

Saves, ranks and resumed runs under stress use it in forked children; so do tests of full disks.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

RENAMES = ("replace", "rename", "link", "unlink", "remove")


class Operation(NamedTuple):
    """Something done to the disk: open, write, fsync or one of RENAMES.

    path: the file or folder; other: a renamed or linked one's new name; data: what was written.
    """

    name: str
    path: str
    other: str = ""
    data: bytes = b""


class Moment(NamedTuple):
    """When to strike: before or after operation `number`, or with `done` bytes of a write done."""

    number: int
    place: str = "before"  # "before", "after" or "within"
    done: int = 0


@dataclass
class Injector:
    """What a process did to files while `watching`, and what happens `at` a moment of it.

    act: what happens then; it may raise, kill this process or do nothing. seen: all operations
    begun so far, in order. only: files whose name it is true of; others are left alone.
    """

    at: Moment | None = None
    act: Callable[[], None] = field(default=lambda: kill_self())
    only: Callable[[str], bool] = field(default=lambda path: True)
    seen: list[Operation] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[Injector]:
        """A context in which this process's file operations pass through here."""
        wrapped = {name: getattr(os, name) for name in ("fsync", *RENAMES)}
        plain_open = builtins.open
        try:
            builtins.open = io.open = self._opener(plain_open)
            os.fsync = self._fsync(wrapped["fsync"])
            for name in RENAMES:
                setattr(os, name, self._rename(name, wrapped[name]))
            yield self
        finally:
            builtins.open = io.open = plain_open
            for name, function in wrapped.items():
                setattr(os, name, function)

    def around(self, operation: Operation, work: Callable[[], Any]) -> Any:
        """Do `work`, with the strike before or after it where this is the operation for it."""
        number = len(self.seen)
        self.seen.append(operation)
        if self.at == Moment(number, "before"):
            self.act()
        result = work()
        if self.at == Moment(number, "after"):
            self.act()
        return result

    def write(self, path: str, data: bytes, raw_write: Callable[[bytes], int]) -> int:
        """Write `data`, or the first bytes of it and then the strike."""
        number, at = len(self.seen), self.at
        if at and at.number == number and at.place == "within":
            self.seen.append(Operation("write", path, data=data[: at.done]))
            raw_write(data[: at.done])
            self.act()
            return at.done
        return self.around(Operation("write", path, data=data), lambda: raw_write(data))

    def _opener(self, plain_open: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *rest: Any, **how: Any) -> Any:
            watched = isinstance(file, str | os.PathLike) and set("wax") & set(mode)
            if not watched or not self.only(os.fspath(file)):
                return plain_open(file, mode, *rest, **how)
            path = os.path.abspath(file)
            raw = self.around(
                Operation("open", path), lambda: _RawFile(path, _raw_mode(mode), self)
            )
            buffered = io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, how.get("encoding"), newline=how.get("newline"))

        return opened

    def _fsync(self, plain: Callable[[int], None]) -> Callable[[Any], None]:
        def fsync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if not self.only(path):
                return plain(number)
            return self.around(Operation("fsync", path), lambda: plain(number))

        return fsync

    def _rename(self, name: str, plain: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, *target: Any, **how: Any) -> None:
            paths = [os.path.abspath(path) for path in (source, *target)]
            if how or not any(self.only(path) for path in paths):
                return plain(source, *target, **how)
            return self.around(Operation(name, *paths), lambda: plain(source, *target))

        return renamed


class _RawFile(io.FileIO):
    """A file opened for writing whose every write passes through an injector."""

    def __init__(self, path: str, mode: str, injector: Injector) -> None:
        super().__init__(path, mode)
        self._path, self._injector = path, injector

    def write(self, data: Any) -> int:
        return self._injector.write(self._path, bytes(data), super().write)


def _raw_mode(mode: str) -> str:
    return "".join(letter for letter in mode if letter in "wax+")


def kill_self() -> None:
    """SIGKILL to this process: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def raising(error: Exception) -> Callable[[], None]:
    """A strike that raises `error`."""

    def act() -> None:
        raise error

    return act


def on_call(number: int, act: Callable[[], None], function: Callable[..., Any]) -> Callable:
    """The signal scheduler: `function`, with `act` before its `number`-th call (from 0) begins."""
    calls = 0

    def counted(*args: Any, **how: Any) -> Any:
        nonlocal calls
        if calls == number:
            calls += 1
            act()
        else:
            calls += 1
        return function(*args, **how)

    return counted


def in_a_child(work: Callable[[], None], *, log: Path | None = None) -> int:
    """The number of a forked process that does `work` and ends with 0, its SystemExit's code or 1.

    log: the file that its output and its traceback go to; the children it leaves are not awaited.
    Only one thread may compute in this process: OpenMP's threads do not survive a fork.
    """
    if number := os.fork():
        return number
    code = 1
    try:
        if log is not None:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for number, name in ((1, "stdout"), (2, "stderr")):  # which pytest may have replaced
                os.dup2(target, number)
                setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        with suppress(Exception):
            traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(child: int) -> int:
    """How a forked child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
