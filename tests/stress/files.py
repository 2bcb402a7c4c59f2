"""Broken and hostile files by the thousand, offered to the project's own readers.

Readers run in forked workers with 1 GiB of address space above what they start with and 5 seconds
of computing a file (a minute on the clock, as machines are shared); their faults are
reported to the parent, which continues after a worker died.
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.stress.hostile.kinds import Kind, all_kinds
from tests.stress.injector import in_a_child, wait_for
from tests.stress.rows import Row

SPARE_BYTES = 1 << 30
MAX_SECONDS = 5  # of computing
SILENT_SECONDS = 60  # after which the parent ends a worker that even the alarm could not stop
LONGEST_MESSAGE = 1000  # characters
WORKERS = 2


class TooSlow(BaseException):
    """Raised in a worker when a file took longer than MAX_SECONDS."""


def _too_slow(*_: Any) -> None:
    raise TooSlow


@contextmanager
def bounded_memory() -> Iterator[None]:
    """A context in which this process may take SPARE_BYTES more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        yield
    finally:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def judged(kind: Kind, folder: Path, canary: Path) -> str:
    """How reading went: "read", "refused" or what was wrong with it."""
    try:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        kind.read(folder)
        verdict = "read"
    except (ValueError, OSError) as error:
        verdict = judged_message(error)
    except TooSlow:
        verdict = f"took over {MAX_SECONDS} s"
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error!s:.150}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if canary.exists():
        canary.unlink()
        verdict = "its code ran"
    return verdict


def judged_message(error: BaseException) -> str:
    """ "refused" for an error of one plain line that hides no lack of memory."""
    text, cause = str(error).strip(), error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"wanted over 1 GiB: {text:.150}"
        cause = cause.__cause__ or cause.__context__
    if not text:
        return f"{type(error).__name__} without a message"
    if "\n" in text or len(text) > LONGEST_MESSAGE:
        return f"a message of {len(text.splitlines())} lines, {len(text)} characters: {text:.100}"
    return "refused"


def offer(kinds: list[Kind], number: int, scratch: Path, *, seed: int) -> tuple[str, str]:
    """(kind, verdict) of the broken file `number`; it depends on that and the seed alone."""
    kind, draw = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
    folder, canary = scratch / kind.name.replace(" ", "-"), scratch / "canary"
    content = kind.broken(draw, canary)
    (folder / kind.place).write_bytes(content)
    return kind.name, judged(kind, folder, canary)


def prepare(kinds: list[Kind], scratch: Path) -> None:
    """Each kind's folder with good files in it, all of which must be read without complaint."""
    for kind in kinds:
        folder = scratch / kind.name.replace(" ", "-")
        folder.mkdir()
        kind.make(folder)
        (folder / kind.place).write_bytes(kind.good)
        kind.read(folder)


def work(numbers: range, kinds: list[Kind], *, seed: int, pipe: int) -> None:
    """Offer the files `numbers`, a line to `pipe` for each: number, kind and verdict."""
    signal.signal(signal.SIGPROF, _too_slow)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of broken files
    with tempfile.TemporaryDirectory(dir=memory_folder()) as scratch:
        prepare(kinds, Path(scratch))
        with bounded_memory():
            for number in numbers:
                kind, verdict = offer(kinds, number, Path(scratch), seed=seed)
                line = f"{number}\t{kind}\t{' '.join(verdict.split())}\n"
                os.write(pipe, line.encode("utf-8", "replace"))


def memory_folder() -> str | None:
    """Where files that live for a millisecond go: into memory, if there is such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Worker:
    """A forked worker on a stride of numbers; `lines` gives what it told since last asked."""

    def __init__(self, numbers: range, kinds: list[Kind], seed: int) -> None:
        self.left, self.kinds, self.seed = numbers, kinds, seed
        self._start()

    def _start(self) -> None:
        self.pipe, writer = os.pipe()
        numbers, pipe = self.left, self.pipe

        def child() -> None:
            os.close(pipe)
            work(numbers, self.kinds, seed=self.seed, pipe=writer)

        self.process = in_a_child(child)
        os.close(writer)
        self.rest, self.heard = b"", time.monotonic()

    def lines(self) -> tuple[list[list[str]], bool]:
        """(number, kind and verdict of each file since, whether all are done)."""
        if time.monotonic() - self.heard > SILENT_SECONDS:
            os.kill(self.process, signal.SIGKILL)
        part = os.read(self.pipe, 1 << 16) if select.select([self.pipe], [], [], 0.1)[0] else None
        if part is None:
            return [], False
        self.heard = time.monotonic()
        *whole, self.rest = (self.rest + part).split(b"\n")
        found = [line.decode().split("\t") for line in whole]
        self.left = self.left[len(found) :]
        if part:
            return found, False
        os.close(self.pipe)
        code = wait_for(self.process)
        if not self.left:
            return found, True
        lost, self.left = self.left[0], self.left[1:]
        kind = self.kinds[lost % len(self.kinds)].name
        found.append([str(lost), kind, f"the worker ended with {code}"])
        if self.left:
            self._start()
        return found, not self.left


def run_files(number: int, seed: int = 0) -> list[Row]:
    """`number` broken files in turns over all kinds; the row's note says what became of them."""
    started, kinds = time.monotonic(), all_kinds()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(kinds, Path(scratch))  # a good file that cannot be read would make all this idle
    row = Row("files", "broken and hostile files read or refused in one line", number)
    workers = [Worker(range(k, number, WORKERS), kinds, seed) for k in range(WORKERS)]
    read = 0
    while workers:
        for worker in list(workers):
            found, done = worker.lines()
            for place, kind, verdict in found:
                read += verdict == "read"
                if verdict not in ("read", "refused"):
                    row.faults.append(f"{kind} {place}: {verdict}")
            if done:
                workers.remove(worker)
    refused = number - read - len(row.faults)
    row.note = f"{len(kinds)} kinds of files, {refused} refused, {read} still readable"
    row.seconds = time.monotonic() - started
    return [row]


def run(*, full: bool) -> list[Row]:
    """The figures of this part: 20,000 files, or a sample."""
    return run_files(20_000 if full else 1_200)
