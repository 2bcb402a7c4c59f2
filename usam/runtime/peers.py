"""The processes of a run watch each other: when one fails, the others end within seconds."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from usam.runtime.processes import world_size

FAILED = 1  # exit code of a process that ends because another did
SECONDS = 0.5  # between two heartbeats
GRACE = 2.0  # seconds a process has to print its own error
SAVING = 10.0  # seconds that a save in progress may take to finish
LONGEST_PAUSE = timedelta(days=7)  # of a process that is stopped, but alive
PEER_FAILED = "u-sam.py: another process of this run failed; see its error above"
# Errors of gloo when the other side has ended.
LOST = re.compile("closed by peer|reset by peer|Broken pipe", re.IGNORECASE)


@contextmanager
def watched() -> Iterator[None]:
    """Context manager that all processes leave together; ends this process when another fails.

    A process that waits for a dead one inside a collective of its device would wait for ever, so
    a separate thread exchanges heartbeats over a gloo group. An exit by SystemExit counts as one
    that all processes agreed on.
    """
    if world_size() == 1:
        yield
        return
    watch = PeerWatch()
    watch.start()
    try:
        yield
    except SystemExit:
        watch.leave()
        raise
    watch.leave()


class PeerWatch(threading.Thread):
    """A thread that exchanges heartbeats with all processes until all of them leave."""

    def __init__(self) -> None:
        super().__init__(name="peers", daemon=True)
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_PAUSE)
        self._leaving = threading.Event()

    def run(self) -> None:
        """Exchange heartbeats; end this process when another no longer answers."""
        all_leave = False
        while not all_leave:
            self._leaving.wait(SECONDS)
            heartbeat = torch.tensor(int(self._leaving.is_set()))
            try:
                dist.all_reduce(heartbeat, dist.ReduceOp.MIN, group=self._group)
            except RuntimeError:
                time.sleep(GRACE)
                print(PEER_FAILED, file=sys.stderr, flush=True)
                end(FAILED)
            all_leave = bool(heartbeat)

    def leave(self) -> None:
        """Return when all processes are about to leave."""
        self._leaving.set()
        self.join()


def end_by(error: BaseException) -> NoReturn:
    """End this process because of `error`; in a run of one process, raise it.

    The traceback is printed unless the error only says that another process has ended.
    """
    if world_size() == 1:
        raise error
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        print(PEER_FAILED, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    end(FAILED)


def end(code: int) -> NoReturn:
    """Exit with `code`; if there are several processes, at once, after any save in progress.

    It skips the distributed shutdown, which would wait for the others.
    """
    if world_size() == 1:
        sys.exit(code)
    until = time.monotonic() + SAVING
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join(max(until - time.monotonic(), 0))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
