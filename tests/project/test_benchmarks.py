"""The benchmarks run: a quick table of most on the CPU, and the GPU's rows without a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

Printed = Callable[..., str]


@pytest.fixture
def printed(capsys: Any, monkeypatch: Any) -> Printed:
    """What `python -m benchmarks.NAME FLAGS` prints, run here; its own processes are real."""

    def run(name: str, *flags: str) -> str:
        threads = ("--threads", str(torch.get_num_threads()))
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *threads, *flags])
        importlib.import_module(f"benchmarks.{name}").main()
        return capsys.readouterr().out

    return run


def table(printed: str) -> list[list[str]]:
    """The rows of what was printed, cell by cell, without their heads."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {number - 1 for number, row in enumerate(rows) if set(row[0]) == {"-"}}
    return [r for n, r in enumerate(rows) if n not in heads and n - 1 not in heads]


@pytest.mark.parametrize(
    ("command", "ratio"),
    [("train_step", 3), ("evaluate", 3), ("end_to_end", 3), ("cached", 3),
     ("memory", 3),
     ("profile --what training --dtype bfloat16", 1)],
)  # fmt: skip
def test_a_quick_run_measures_every_row(command: str, ratio: int, printed: Printed) -> None:
    rows = table(printed(*command.split(), "--quick", "--device", "cpu"))
    assert rows
    for row in rows:
        assert float(row[ratio].split()[0]) > 0, row


@pytest.mark.parametrize("name", ["train_step", "evaluate", "end_to_end", "data", "train_step3d"])
def test_rows_of_a_gpu_that_is_not_there_are_unmeasured(name: str, printed: Printed) -> None:
    rows = table(printed(name, "--unmeasured", "--device", "cuda"))
    assert rows
    assert all(row[1:4] == ["unmeasured"] * 3 for row in rows)
