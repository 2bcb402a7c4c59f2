"""Stopping by signal: all processes stop after the same step, and training is saved.

The signals are SIGTERM, SIGUSR1 (batch systems), SIGHUP (a closed terminal) and Ctrl-C.
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

STOPPED = 75  # exit code of a run that was saved and can be resumed: EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
AGAIN = b"\nstopping after this step and saving; Ctrl-C again ends at once without saving\n"
CLOSED_AFTER = 0.2  # seconds, the programs that Ctrl-C ends together with this one
SECONDS = 0.5  # between two exchanges of the flag
MAX_CALLS = 16  # between two exchanges, in case steps suddenly take longer


class StopRequest:
    """Context manager that handles signals and tells whether any process was asked to stop.

    Before `watch` there is nothing to save, and a signal ends the process at once with STOPPED.
    After it a signal is only noted, and `asked` returns True on every process at the same step; a
    second Ctrl-C in a run of one process is a KeyboardInterrupt. The flag is exchanged over a
    separate gloo group, so that no device has to be waited for. SIGHUP stays ignored under nohup.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._noted = self._interrupted = self._watched = False
        self._group: Any = None
        self._calls, self._calls_wanted, self._since = 0, 1, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():  # once saved, nothing may change the exit code
            signal.signal(number, signal.SIG_IGN if self.agreed else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        if number == signal.SIGHUP:
            redirect_closed_outputs()
        if number == signal.SIGINT and self._watched and world_size() == 1:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            redirect_closed_outputs()
            os.write(2, AGAIN)  # print may be what was interrupted
        if not self._watched:
            name = signal.Signals(number).name
            print(f"stopped by {name} before training: nothing to save", flush=True)
            end(STOPPED)

    def watch(self) -> None:
        """Note signals from now on; every process must call it."""
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._watched = True

    def asked(self, *, at_once: bool = False) -> bool:
        """Whether a process received a signal to stop; all processes must call it equally often.

        The flag is exchanged twice per second, or at every call where calls are rarer. `at_once`
        exchanges it now and restarts the measurement of how often calls come.
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
        """Return when every process has called this: none may exit while another is saving."""
        if self._group is not None:
            dist.barrier(self._group)


def redirect_closed_outputs() -> None:
    """Discard output to a closed terminal or an ended program, such as `| tee log` after Ctrl-C.

    Writing to it would raise an error during the save.
    """
    time.sleep(CLOSED_AFTER)
    for number in (1, 2):
        pipe = select.poll()
        pipe.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


class StoppableBatches:
    """The batches of an evaluation loader; they end early when the run receives a signal to stop.

    Every process checks equally often, even if its share is one batch shorter than another's.
    """

    def __init__(self, loader: DataLoader, stop: StopRequest) -> None:
        self._loader, self._stop = loader, stop

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        samples_at_once = self._loader.batch_size * world_size()
        batches = iter(self._loader)
        for number in range(math.ceil(len(self._loader.dataset) / samples_at_once)):
            if number and self._stop.asked(at_once=number == 1):  # there is always one batch
                return
            batch = next(batches, None)
            if batch is not None:
                yield batch


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Context manager that blocks the signals, also in processes started within it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(worker: int) -> None:
    """Make a DataLoader worker ignore signals that are sent to the whole process group.

    Batch systems signal whole process groups; a worker that ended would end the run unsaved. Only
    its own process may end it by SIGTERM, as torch does with one that hangs at exit. The worker
    was started within `signals_blocked`.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not say which process sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getppid()

    def end_with_parent() -> None:
        while True:
            sent = signal.sigwaitinfo(SIGNALS)
            if sent.si_pid == parent and sent.si_signo == signal.SIGTERM:
                os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
