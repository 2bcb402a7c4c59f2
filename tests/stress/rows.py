"""A figure of the stress tests: what was injected how often, and how often all went well.

Every part gives rows; __main__ prints them and fails if one is not as wanted.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Row:
    """One figure. good of number is what was found; faults: a line for each of the others."""

    part: str
    what: str
    number: int
    faults: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> int:
        """How many of `number` went well."""
        return self.number - len(self.faults)

    def __str__(self) -> str:
        text = f"{self.part:<7} {self.what:<58} {self.good:>6} of {self.number:<6}"
        return f"{text} {self.seconds:7.1f} s  {self.note}".rstrip()


def summary(faults: Sequence[str], most: int = 5) -> list[str]:
    """The kinds of faults, most frequent first, with how often each was met."""
    kinds = Counter(re.sub(r"\d+", "#", fault) for fault in faults)
    example = {re.sub(r"\d+", "#", fault): fault for fault in reversed(faults)}
    return [f"{count} x {example[kind]}" for kind, count in kinds.most_common(most)]


def machine() -> str:
    """This machine and its versions in one line, with the date: what figures belong to."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))
        name = found[1].strip() if found else name
        bf16 = ", AVX512-BF16" if "avx512_bf16" in info.read_text(encoding="utf-8") else ""
        name += bf16
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return f"{cores} cores of {name}; {versions}; {time.strftime('%Y-%m-%d')}"
