"""Fair comparisons: paired timings of two programs and the peak memory of one process.

The benchmarks beside it say what is compared; nothing here knows a model.
"""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

Work = Callable[[], object]


def seconds(work: Work, device: torch.device) -> float:
    """Wall-clock seconds of one call, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def paired_seconds(
    first: Work, second: Work, *, rounds: int, device: torch.device
) -> list[tuple[float, float]]:
    """Timings (first, second) of 2 * rounds neighbouring calls, after one unmeasured call each.

    Order A B B A in every round, so that a machine that slows down slows both alike.
    """
    first(), second()
    pairs = []
    for _ in range(rounds):
        a, b = seconds(first, device), seconds(second, device)
        pairs.append((a, b))
        b, a = seconds(second, device), seconds(first, device)
        pairs.append((a, b))
    return pairs


def spread(values: list[float], digits: int = 3) -> str:
    """Median and range as text: `12.1 (11.8 .. 12.6)`."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


class PeakMemory:
    """Bytes that a with-block's peak lies above what was in use at its start, in `.bytes`.

    On a CUDA device the allocator's count, else the process's resident set, looked at every
    millisecond from a thread (Linux; torch computes without Python's lock).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self.stop = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        else:
            self.start = resident_bytes()
            self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
        else:
            self.stop.set()
            self.watcher.join()

    def watch(self) -> None:
        while not self.stop.wait(0.001):
            self.bytes = max(self.bytes, resident_bytes() - self.start)


def resident_bytes() -> int:
    """This process's resident set, from Linux's /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def machine(device: torch.device) -> str:
    """One line: processor or accelerator, threads, versions, date."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [row for row in info.read_text().splitlines() if row.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {date.today().isoformat()}"
    )
