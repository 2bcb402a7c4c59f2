"""Progress bars of long loops, on rank 0: quick on a terminal, sparse in a log file.

The engine, the click rounds and the prompt sweep draw theirs here.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from usam.runtime.processes import is_main

LOG_SECONDS = 30  # between two lines of a bar that is written to a file


def is_terminal() -> bool:
    """Whether bars are looked at as they move."""
    return sys.stderr.isatty()


def progress_bar(*items: Any, **how: Any) -> tqdm:
    """tqdm's bar over `items`, gone when it is done; `how` as tqdm's own."""
    often = 0.1 if is_terminal() else LOG_SECONDS
    return tqdm(
        *items, disable=not is_main(), leave=False, dynamic_ncols=True, mininterval=often,
        maxinterval=max(10, often), **how,
    )  # fmt: skip
