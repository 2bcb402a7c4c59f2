"""Processes of one run watch over each other: once one is gone, the others end, too, and soon.

u-sam.py watches from the moment they have met, and ends through `end` where something went wrong.
"""

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
SECONDS = 0.5  # between two signs of life
GRACE = 2.0  # seconds a process has to say itself what it ran into
SAVING = 10.0  # seconds a save under way may take to its end
PATIENCE = timedelta(days=7)  # with a process that is stopped, but alive
GONE = "u-sam.py: another process of this run has ended; see what it said"
# What a collective of the gloo backend says where the other side is no more.
LOST = re.compile("closed by peer|reset by peer|Broken pipe", re.IGNORECASE)


@contextmanager
def watched() -> Iterator[None]:
    """A context that all processes leave together, or that ends this one when another is gone.

    A process that waits for a dead one inside a collective of its device would wait for ever; so
    a thread of its own exchanges signs of life over a gloo group. An exit by SystemExit counts as
    one that all agreed on.
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
    """Signs of life from all processes until all of them leave."""

    def __init__(self) -> None:
        super().__init__(name="peers", daemon=True)
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._leaving = threading.Event()

    def run(self) -> None:
        """Exchange signs of life; end this process when another does not answer any more."""
        everybody_leaves = False
        while not everybody_leaves:
            self._leaving.wait(SECONDS)
            sign = torch.tensor(int(self._leaving.is_set()))
            try:
                dist.all_reduce(sign, dist.ReduceOp.MIN, group=self._group)
            except RuntimeError:
                time.sleep(GRACE)
                print(GONE, file=sys.stderr, flush=True)
                end(FAILED)
            everybody_leaves = bool(sign)

    def leave(self) -> None:
        """Return when all processes are about to leave."""
        self._leaving.set()
        self.join()


def end_by(error: BaseException) -> NoReturn:
    """End this process of several because of `error`, shown unless it is only that another ended.

    Where there is one process, raises `error`.
    """
    if world_size() == 1:
        raise error
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        print(GONE, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    end(FAILED)


def end(code: int) -> NoReturn:
    """End this process with `code`, of several at once, without a farewell that others must answer.

    A save under way still has some seconds.
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
