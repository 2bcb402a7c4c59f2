"""u-sam.py in tests: run here or as processes, on a small drawn store, and what its runs leave.

The tests of the command line, of resuming, stopping and tuning share it.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import ROOT

SCRIPT = str(ROOT / "u-sam.py")
TINY = ("--sam_model", "vit_tiny", "--sam_weight", "none", "--img_size", "32", "--device", "cpu",
        "--amp", "off", "--num_workers", "0")  # fmt: skip
TRAINED = (*TINY, "--epochs", "3", "--batch_size", "4", "--accumulation_steps", "2",
           "--prompt_mode", "3", "--warmup", "--clip_max_norm", "1", "--val_fraction", "0.34",
           "--dataset", "store", "--recipe", "published")  # fmt: skip
AGAIN = tuple(word for word in TRAINED if word not in ("--sam_weight", "none"))  # with --resume
EPOCHS = 3
SAVING = ("save_every", "keep", "override", "world_size", "dist_url")  # and how it is launched
RUN_FILES = {"best.pth", "last.pth", "log.jsonl", "manifest.json", "curves.png"}
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Result(NamedTuple):
    """How a run ended and what it wrote."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture, *arguments: str | Path) -> Result:
    """`python u-sam.py arguments`, in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["u-sam.py", *map(str, arguments)])
        for name in LAUNCH_VARIABLES:
            patched.delenv(name, raising=False)
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    return Result(code, *capsys.readouterr())


def environment() -> dict[str, str]:
    """This process's variables, with its Python first and without a launcher's."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    folder = Path(sys.executable).parent
    return kept | {"PATH": f"{folder}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def assert_same_run(found: Path, wanted: Path, *free: str) -> None:
    """Same log byte for byte, same state but for the flags `free` and those no number needs."""
    assert (found / "log.jsonl").read_bytes() == (wanted / "log.jsonl").read_bytes()
    for name in ("last.pth", "best.pth"):
        states = [torch.load(run / name, weights_only=True) for run in (found, wanted)]
        for state in states:
            for flag in ("output_dir", "resume", "sam_weight", "num_workers", *SAVING, *free):
                del state["args"][flag]
            del state["manifest"]  # with the revision, which may change while tests run
        first, second = (dict(leaves(state)) for state in states)
        assert first.keys() == second.keys()
        assert [key for key in first if first[key] != second[key]] == []


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists with its path; tensors as type, shape and bytes."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(state, list):
        for number, value in enumerate(state):
            yield from leaves(value, f"{path}/{number}")
    elif isinstance(state, torch.Tensor):
        yield path, (state.dtype, state.shape, state.numpy().tobytes())
    else:
        yield path, state


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def launch(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], env=environment(), cwd=ROOT, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip


def assert_refused(result: Result, *wanted: str | Path) -> None:
    """Code 2 and one line on stderr (progress bars aside) that holds all that is wanted."""
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("u-sam.py: error: ")
    for part in wanted:
        assert str(part) in lines[0]
