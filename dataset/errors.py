"""Errors that input or machine can cause, as one line for the user."""

from __future__ import annotations

import re
import struct
import zlib
from zipfile import BadZipFile

# What reading any input may raise. Anything else is a defect of this program.
INPUT_ERRORS = (
    ValueError,
    OSError,
    MemoryError,
    RecursionError,
    OverflowError,
    EOFError,
    BadZipFile,
    struct.error,
    zlib.error,
)
# What torch raises as a RuntimeError, and what to do about it.
MACHINE = (
    (r"CUDA out of memory|CUDA error: out of memory",
     "out of GPU memory; use a smaller --batch_size or --checkpoint_activations"),
    (r"can't allocate memory|not enough memory|[Cc]annot allocate memory",
     "out of memory; use a smaller --batch_size or fewer --num_workers"),
    (r"shared memory|/dev/shm|killed by signal: Bus error",
     "not enough shared memory (/dev/shm) for the DataLoader workers; use --num_workers 0, or "
     "docker run --shm-size 8g"),
    (r"DataLoader worker .* (killed by signal|exited unexpectedly)",
     "a DataLoader worker was killed, possibly out of memory; use fewer --num_workers"),
    (r"[Cc]an't start new thread|Resource temporarily unavailable",
     "too many processes or threads; use fewer --num_workers"),
    (r"PytorchStreamWriter|No space left on device", "writing a file failed; is the disk full?"),
)  # fmt: skip
IN_WORKER = "in DataLoader worker process"
MAX_LENGTH = 600  # characters


def reason(error: BaseException) -> str | None:
    """One line that says what went wrong; None for any other error, which is a bug.

    Of an error in a DataLoader's worker, which comes with its whole traceback, the last line.
    """
    text = str(error).strip()
    if isinstance(error, RuntimeError | MemoryError) or "shared memory" in text:
        for pattern, advice in MACHINE:
            if re.search(pattern, text):
                return advice
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, MemoryError):
        return "out of memory" + (f": {_cut(text)}" if text else "")
    if isinstance(error, INPUT_ERRORS):
        if IN_WORKER in text:
            text = re.sub(r"^[\w.]*Error: ", "", text.splitlines()[-1])
        return _cut(text) or type(error).__name__
    return None


def _cut(text: str) -> str:
    text = " ".join(text.split())
    half = MAX_LENGTH // 2
    return text if len(text) <= MAX_LENGTH else f"{text[:half]} ... {text[-half:]}"
