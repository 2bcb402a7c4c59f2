"""Signals to stop: a closed terminal counts as one, unless nohup ignores it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from usam.runtime.signals import SIGNALS, StopRequest

# A run on a terminal that waits for a signal, prints, and then has something to save.
SCRIPT = """
import os, sys, time
from usam.runtime.signals import StopRequest
with StopRequest() as stop:
    stop.watch()
    open(sys.argv[1], "w").write("ready")
    while not stop.asked(at_once=True):
        time.sleep(0.05)
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
    open(sys.argv[2], "w").write("saved")
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_closed_terminal_ends_in_a_save(tmp_path: Path) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    terminal, side = os.openpty()
    take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # the controlling one
    process = subprocess.Popen(
        [sys.executable, "-c", take + SCRIPT, str(ready), str(saved)], cwd=ROOT,
        stdin=side, stdout=side, stderr=side, start_new_session=True,
    )  # fmt: skip
    os.close(side)
    try:
        while not ready.exists():
            assert process.poll() is None
        os.close(terminal)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert saved.read_text(encoding="utf-8") == "saved"


def test_nohup_keeps_a_closed_terminal_from_ending_the_run() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.watch()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked(at_once=True)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_noted(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usam.runtime.signals.redirect_closed_outputs", lambda: None)
    before = {other: signal.signal(other, signal.SIG_DFL) for other in SIGNALS}
    try:
        with StopRequest() as stop:
            stop.watch()
            assert not stop.asked(at_once=True)
            os.kill(os.getpid(), number)
            assert stop.asked(at_once=True)
    finally:  # a run that was stopped ignores further signals
        for other, handler in before.items():
            signal.signal(other, handler)
