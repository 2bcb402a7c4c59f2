"""Errors of input and machine as one line."""

from __future__ import annotations

import json
import struct

import pytest

from dataset.errors import reason


def raised(text: str) -> BaseException:
    with pytest.raises((ValueError, RecursionError, OverflowError)) as caught:
        float(json.loads(text))
    return caught.value


def test_odd_json_gives_one_line() -> None:
    deep = raised("[" * 100_000)
    assert reason(deep) == "the input is nested too deeply"
    assert "too large" in reason(raised("9" * 401))
    assert "digits" in reason(raised("9" * 5000))


def test_a_workers_traceback_is_its_last_line() -> None:
    text = "Caught ValueError in DataLoader worker process 0.\nTraceback:\n  x\nValueError: label 9"
    assert reason(ValueError(text)) == "label 9"
    text = "study: holds 2 DICOM series; choose one with --series NUMBER:\n  1: CT; 2: MR"
    assert reason(ValueError(text)) == " ".join(text.split())


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
                      "that dataloader's workers are out of shared memory."), "--shm-size"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28), shared "
                      "memory"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--num_workers"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
         "out of memory"),
        (MemoryError("Unable to allocate 2 TiB"), "out of memory: Unable to allocate 2 TiB"),
        (MemoryError(), "out of memory"),
        (struct.error("unpack requires 4 bytes"), "unpack requires 4 bytes"),
        (EOFError(), "EOFError"),
        (OSError(28, "No space left on device", "a.pth"), "No space left on device: 'a.pth'"),
    ],
)  # fmt: skip
def test_errors_of_the_machine_say_what_to_do(error: BaseException, part: str) -> None:
    assert part in reason(error)
    assert "\n" not in reason(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), TypeError("x"), KeyError("y")])
def test_defects_are_not_taken_for_bad_input(error: BaseException) -> None:
    assert reason(error) is None


def test_long_texts_are_cut() -> None:
    assert len(reason(ValueError("a" * 10_000))) < 700
