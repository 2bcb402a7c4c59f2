"""Fair comparisons: paired timings, peak memory, what the machine can do, and rows of a table.

The benchmarks beside it say what is compared; nothing here knows a model.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = Callable[[], object]
UNMEASURED = "unmeasured"


class Row(NamedTuple):
    """A line of a results table; what was not run on this machine stays "unmeasured"."""

    what: str
    goal: str = ""
    ours: str = UNMEASURED
    baseline: str = UNMEASURED
    ratio: str = UNMEASURED


class Cases(NamedTuple):
    """What a benchmark compares on either kind of device, and in a quick proof that it runs.

    A case has a `goal` and says in str() what it is.
    """

    cpu: tuple
    gpu: tuple
    quick: tuple


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


def compared(row: Row, pairs: list[tuple[float, float]], items: int, unit: str) -> Row:
    """`row` with rates (items a second) and the paired ratios of times (ours, baseline)."""
    ours, baseline = (spread([items / t for t in times], 2) for times in zip(*pairs, strict=True))
    ratio = spread([theirs / our for our, theirs in pairs], 2)
    return row._replace(ours=f"{ours} {unit}", baseline=f"{baseline} {unit}", ratio=ratio)


def table(rows: list[Row]) -> str:
    """The rows as Markdown; figures are medians with their range."""
    lines = ["| what | ours | baseline | ratio | goal |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {r.what} | {r.ours} | {r.baseline} | {r.ratio} | {r.goal} |" for r in rows)]
    )


def device_parser(about: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run: proof, not a result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A")
    parser.add_argument("--unmeasured", action="store_true", help="the empty table of --device")
    return parser


def run_rows(
    title: str, options: argparse.Namespace, compare: Callable[[Any, Any], Row], cases: Cases
) -> None:
    """Print the table of a benchmark: its quick rows or those of the device, measured or empty."""
    options.rounds = 1 if options.quick else options.rounds
    set_up(options)
    wanted = cases.gpu if options.device.startswith("cuda") else cases.cpu
    if options.unmeasured:
        print(table([Row(str(case), case.goal) for case in wanted]))
        return
    rows = [compare(case, options) for case in (cases.quick if options.quick else wanted)]
    print(f"{title}; {machine(torch.device(options.device))}\n")
    print(table(rows))


def set_up(options: argparse.Namespace) -> None:
    """The requested threads, and float32 meaning float32: no TF32 on either side."""
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@cache
def peaks(device: torch.device) -> dict[str, float]:
    """What the machine reaches now: matrix products (FLOP/s) by dtype, "copy" in bytes/s."""
    is_cuda, found = device.type == "cuda", {}
    side = 8192 if is_cuda else 1536
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(side, side, dtype=dtype, device=device)
        found[str(dtype).removeprefix("torch.")] = 2 * side**3 / best_of(lambda a=a: a @ a, device)
    source = torch.ones((2**30 if is_cuda else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()  # read and written
    return found | {"copy": copied / best_of(lambda: target.copy_(source), device)}


def best_of(work: Work, device: torch.device, repeats: int = 5) -> float:
    """The shortest of a few timings, after one that is not counted."""
    work()
    return min(seconds(work, device) for _ in range(repeats))


def peaks_line(device: torch.device) -> str:
    """`peaks` in words."""
    found = peaks(device)
    return (
        f"measured peaks: matrix products {found['float32'] / 1e9:.0f} GFLOP/s float32 and "
        f"{found['bfloat16'] / 1e9:.0f} GFLOP/s bfloat16, copies {found['copy'] / 1e9:.1f} GB/s"
    )


class BytesMoved(TorchDispatchMode):
    """Counts the bytes that operations in a with-block read and write, views left out.

    Every operand and every result is counted once an operation, as eager execution moves them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            moved = tree_leaves((args, kwargs, result))
            self.bytes += sum(t.nbytes for t in moved if isinstance(t, torch.Tensor))
        return result


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
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def machine(device: torch.device) -> str:
    """One line: processor or accelerator, threads, versions, date."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            row
            for row in info.read_text(encoding="utf-8").splitlines()
            if row.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {date.today().isoformat()}{load}"
    )
