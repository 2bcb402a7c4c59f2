"""How u-sam.py ends when it cannot go on: Ctrl-C, a closed pipe, a missing package, a full machine.

One line or none, never a traceback for what is no defect.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.command import SCRIPT, environment

NOWHERE = ("--dataset", "store", "--data_root", "nowhere", "--device", "cpu")
# u-sam.py, in which an import raises an error where a condition holds.
FAULTY = f"""
import builtins, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
real = builtins.__import__

def without(name, *more, **named):
    package, importer = name.partition(".")[0], sys._getframe(1).f_code.co_name
    if CONDITION:
        raise ERROR
    return real(name, *more, **named)

builtins.__import__ = without
sys.argv[0] = "u-sam.py"
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""


def faulty(condition: str, error: str) -> str:
    return FAULTY.replace("CONDITION", condition).replace("ERROR", error)


def ended(script: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, env=environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "error", "package"),
    [
        ("torch", "ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "torch"),
        ("cv2", "ModuleNotFoundError(\"No module named 'cv2'\", name='cv2')",
         "opencv-python-headless"),
        ("cv2", "ImportError('libGL.so.1: cannot open shared object file', name='cv2')",
         "opencv-python-headless"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_imported_is_named(missing: str, error: str, package: str) -> None:
    result = ended(faulty(f"package == {missing!r}", error), *NOWHERE)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("u-sam.py: error: ")
    assert line.endswith(f"install it with: pip install {package}")


def test_torch_that_does_not_load_is_one_line() -> None:
    error = "OSError('libcudart.so.12: cannot open shared object file')"
    result = ended(faulty("package == 'torch'", error), *NOWHERE)
    assert result.returncode == 2, result.stderr
    assert result.stderr == ("u-sam.py: error: libcudart.so.12: cannot open shared object file\n")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        ("RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
         "that workers are out of shared memory.')", "--shm-size"),
        ("MemoryError()", "out of memory"),
        ("RecursionError('maximum recursion depth exceeded')", "nested too deeply"),
    ],
)  # fmt: skip
def test_errors_of_the_machine_are_one_line(error: str, part: str) -> None:
    result = ended(faulty("importer == 'main'", error), *NOWHERE)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert part in line


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at /proc")
def test_ctrl_c_while_importing_is_one_line() -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *NOWHERE], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    maps, until = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while "torch" not in maps.read_text(encoding="utf-8") and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "u-sam.py: interrupted\n")


@pytest.mark.parametrize("words", [("--help",), NOWHERE])
def test_output_that_nobody_reads_ends_quietly(words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=ROOT, env=environment(), stdout=write,
        stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert result.returncode in (0, 141)
    assert result.stderr == ""
