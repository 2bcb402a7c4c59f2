"""Stopping on request: SIGTERM, SIGUSR1, Ctrl-C end training at a step that all processes agree on.

training.py asks after every optimizer step and before every batch of a validation; the workers of
its loaders sit such signals out.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from usam.runtime.peers import end
from usam.runtime.processes import world_size

STOPPED = 75  # exit code of a run that saved itself and may go on: EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN = b"\nstopping after this step, all saved; Ctrl-C again ends at once, unsaved\n"
GONE_AFTER = 0.2  # seconds, what Ctrl-C ends beside this process
SECONDS = 0.5  # between two exchanges of the flag, where steps are shorter
MAX_CALLS = 16  # between two exchanges, should steps suddenly take longer


class StopRequest:
    """Whether a process of this run was asked to stop; a context that listens for the signals.

    Before `watch` there is nothing to save, and a signal ends the process at once with STOPPED.
    From then on it is only noted, however often it comes, and `asked` tells every process so in
    the same place; a second Ctrl-C in a run of one process is a KeyboardInterrupt. The flag
    travels over a gloo group of its own, so no device is waited for.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._noted = self._interrupted = self._watched = False
        self._group: Any = None
        self._calls, self._calls_wanted, self._since = 0, 1, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():  # saved: nothing may change the exit code
            signal.signal(number, signal.SIG_IGN if self.agreed else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        if number == signal.SIGINT and self._watched and world_size() == 1:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            leave_dead_pipes()
            os.write(2, AGAIN)  # print may be what was interrupted
        if not self._watched:
            name = signal.Signals(number).name
            print(f"stopped by {name} before training began: nothing to save", flush=True)
            end(STOPPED)

    def watch(self) -> None:
        """Note signals from here on; every process must call it."""
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._watched = True

    def asked(self, *, at_once: bool = False) -> bool:
        """Whether a process was asked to stop; every process must ask equally often.

        The flag is exchanged twice a second, or at every call where calls are rarer. `at_once`
        exchanges it now, and begins a stretch of calls whose pace is measured anew.
        """
        if self.agreed or self._group is None:
            self.agreed = self.agreed or self._noted
            return self.agreed
        self._calls += 1
        if at_once or self._calls >= self._calls_wanted:
            self._exchange(begins=at_once)
        return self.agreed

    def _exchange(self, *, begins: bool) -> None:
        pace = (time.monotonic() - self._since) / self._calls
        facts = torch.tensor([float(self._noted), pace], dtype=torch.float64)
        dist.all_reduce(facts, dist.ReduceOp.MAX, group=self._group)
        noted, pace = facts.tolist()
        wanted = min(int(SECONDS / max(pace, 1e-6)), 2 * self._calls_wanted, MAX_CALLS)
        self._calls_wanted = 1 if begins else max(wanted, 1)
        self._calls, self._since = 0, time.monotonic()
        self.agreed = noted > 0

    def wait_for_all(self) -> None:
        """Return when every process has come here: none may leave while one still saves."""
        if self._group is not None:
            dist.barrier(self._group)


def leave_dead_pipes() -> None:
    """Send output nowhere that goes to a process that is gone, as `| tee log` is after Ctrl-C.

    Writing to it would be an error, in the midst of saving.
    """
    time.sleep(GONE_AFTER)
    for number in (1, 2):
        pipe = select.poll()
        pipe.register(number, 0)
        if any(event & select.POLLERR for _, event in pipe.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


class Watched:
    """The batches of an evaluation loader, which end early once the run was asked to stop.

    Every process asks equally often, also where its share is a batch shorter than another's.
    """

    def __init__(self, loader: DataLoader, stop: StopRequest) -> None:
        self._loader, self._stop = loader, stop

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        samples_at_once = self._loader.batch_size * world_size()
        batches = iter(self._loader)
        for number in range(math.ceil(len(self._loader.dataset) / samples_at_once)):
            if number and self._stop.asked(at_once=number == 1):  # one batch there is always
                return
            batch = next(batches, None)
            if batch is not None:
                yield batch


@contextmanager
def signals_held() -> Iterator[None]:
    """A context in which no signal comes through; processes started in it begin deaf to them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sit_out_signals(worker: int) -> None:
    """Let a loader's worker end with its process, not by signals that are sent to all of them.

    A scheduler signals whole process groups, and a worker that obeys takes the unsaved run with
    it. Only its own process may end it by SIGTERM, as torch does where one hangs at exit. The
    worker was started with `signals_held`.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getppid()

    def obey_the_parent() -> None:
        while True:
            sent = signal.sigwaitinfo(SIGNALS)
            if sent.si_pid == parent and sent.si_signo == signal.SIGTERM:
                os._exit(0)

    threading.Thread(target=obey_the_parent, daemon=True).start()
