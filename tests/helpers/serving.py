"""A real server process of u-sam.py for tests, with a random tiny model."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

from tests.conftest import ROOT
from tests.helpers.command import environment
from usam.models.sam_med3d import build_sam_med3d


class Running(NamedTuple):
    """A server: its address, process and the file of what it prints."""

    url: str
    process: subprocess.Popen
    printed: Path


def random_weights(path: Path, seed: int = 3) -> Path:
    """A file of SAM-Med3D weights of a tiny size, drawn from a seed."""
    torch.manual_seed(seed)
    torch.save(build_sam_med3d("vit_tiny", "corrected").state_dict(), path)
    return path


def flags_of(weights: Path) -> list[str]:
    """What u-sam.py needs to use them."""
    return ["--model", "sam-med3d", "--sam_model", "vit_tiny", "--rel_pos", "corrected",
            "--sam_weight", str(weights), "--device", "cpu", "--amp", "off"]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(folder: Path, *flags: str, run: str = "--serve") -> Iterator[Running]:
    """`python u-sam.py --serve PORT flags`, until the block ends; its exit code must be 0."""
    port, printed = free_port(), folder / "printed.txt"
    words = [run, str(port)] if run == "--serve" else ["--serve", str(port), run]
    command = [sys.executable, str(ROOT / "u-sam.py"), *words, *flags]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    variables.pop("NN_INTERACTIVE_API_KEY", None)
    with printed.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, printed)
        yield Running(url, process, printed)
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 0, printed.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen, printed: Path, seconds: float = 400) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, printed.read_text()
        try:
            if httpx.get(f"{url}/healthz", timeout=5).json() == {"ok": True}:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError(f"no answer within {seconds} s: {printed.read_text()}")
