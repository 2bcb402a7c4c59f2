"""A process that dies takes the others along within seconds; what is shown is what it said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.command import SCRIPT, TRAINED, environment, free_port

WITHIN = 15  # seconds
# u-sam.py, in which one rank fails in the second call of a function, and another may be busy then.
FAULTY = f"""
import os, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from usam.evaluation import pixels
from usam.training import checkpoint, engine, usam
kind, place, rank, busy = os.environ["FAULT"].split()
owners = {{"save": checkpoint, "to_device": usam, "predictions": pixels}}
owner = owners.get(place, engine)
real, calls = getattr(owner, place), iter(range(100))

def faulty(*given, **named):
    if next(calls) == 1:
        print("FAULT", flush=True)
        if os.environ["RANK"] == rank:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {{"error": ValueError, "defect": ZeroDivisionError}}[kind]("the true error")
        if busy == "busy":
            time.sleep(100)
    return real(*given, **named)

setattr(owner, place, faulty)
sys.argv[0] = "u-sam.py"
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""


def alive(session: int) -> list[str]:
    """Processes of a session, zombies aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (
                (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
            )
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(folder.name)
    return found


@pytest.mark.parametrize(
    "fault",
    [
        "error to_device 1 -",
        "defect _optimizer_step 1 busy",  # one that waits for nobody: no collective fails there
        "kill predictions 1 busy",
        "kill save 0 -",
    ],
)
def test_the_others_end_within_seconds_and_no_process_stays(
    store: Path, tmp_path: Path, fault: str
) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY, encoding="utf-8")
    flags = [*TRAINED, "--data_root", store, "--output_dir", tmp_path / "run", "--epochs", "40",
             "--num_workers", "1", "--save_every", "1", "--batch_size", "1"]  # fmt: skip
    variables = environment() | {"FAULT": fault, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(free_port())
    outputs = [tmp_path / f"out{rank}" for rank in (0, 1)]
    processes = []
    for rank, output in enumerate(outputs):
        of_rank = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(
            [sys.executable, str(script), *map(str, flags)], env=of_rank, start_new_session=True,
            stdout=output.open("w", encoding="utf-8"), stderr=subprocess.STDOUT,
        ))  # fmt: skip
    kind, _, number, _ = fault.split()
    faulty, other = int(number), 1 - int(number)
    code = processes[faulty].wait(timeout=200)
    died = time.monotonic()
    assert processes[other].wait(timeout=60) == 1
    sessions = [process.pid for process in processes]
    while any(alive(session) for session in sessions) and time.monotonic() - died < WITHIN:
        time.sleep(0.1)
    assert time.monotonic() - died < WITHIN
    assert not any(alive(session) for session in sessions)
    said = outputs[faulty].read_text(encoding="utf-8")
    if kind == "kill":
        assert code == -signal.SIGKILL
    else:
        assert (code, "the true error" in said) == (2 if kind == "error" else 1, True)
    assert "another process of this run failed" in outputs[other].read_text(encoding="utf-8")
    assert "Traceback" not in outputs[other].read_text(encoding="utf-8")
