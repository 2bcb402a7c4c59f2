"""Progress bars of long loops, on rank 0: smooth on a terminal, sparse in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from usam.runtime.processes import is_main

LOG_SECONDS = 30  # between two lines of a bar in a log file


def is_terminal() -> bool:
    """Whether bars are shown on a terminal."""
    return sys.stderr.isatty()


def progress_bar(*items: Any, **options: Any) -> tqdm:
    """tqdm's bar over `items`, removed when it is done; options as for tqdm."""
    interval = 0.1 if is_terminal() else LOG_SECONDS
    return tqdm(
        *items, disable=not is_main(), leave=False, dynamic_ncols=True, mininterval=interval,
        maxinterval=max(10, interval), **options,
    )  # fmt: skip
