"""Work on many cases in several processes, with a progress bar and without leftovers.

`prepare` and `verify` use it; a worker handles one case at a time and dies with its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from tqdm import tqdm

from dataset.errors import INPUT_ERRORS, reason

Job = TypeVar("Job")


def default_workers() -> int:
    """Number of workers: one per available core, at most eight, as each holds a whole volume."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, allowed or 1))


def each_case(
    work: Callable[[Job], Any], jobs: Sequence[Job], *, workers: int, title: str
) -> Iterator[tuple[Job, Any]]:
    """(job, result) of every job as it ends; for bad input the result is a ValueError or OSError.

    workers=1 runs here, one after the other. Raises ValueError if a worker process is killed.
    """
    with tqdm(total=len(jobs), desc=title, unit="case", mininterval=0.5) as bar:
        ended = _in_order(work, jobs) if workers <= 1 else _in_pool(work, jobs, workers)
        for job, result in ended:
            bar.update()
            yield job, result


def _in_order(work: Callable[[Job], Any], jobs: Sequence[Job]) -> Iterator[tuple[Job, Any]]:
    for job in jobs:
        yield job, _guarded(work, job)


def _in_pool(
    work: Callable[[Job], Any], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Any]]:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([work.__module__])  # imports are paid for once
    pool = ProcessPoolExecutor(min(workers, len(jobs)) or 1, context, initializer=_die_with_parent)
    try:
        futures = {pool.submit(_guarded, work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, possibly out of memory; run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _guarded(work: Callable[[Job], Any], job: Job) -> Any:
    try:
        return work(job)
    except INPUT_ERRORS as error:
        return error if isinstance(error, ValueError | OSError) else ValueError(reason(error))


def _die_with_parent() -> None:
    """Ends this worker when its parent is killed; otherwise it would wait for work forever."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
