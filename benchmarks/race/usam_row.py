"""A row of u-sam.py: its own command, with as many epochs as fit the time.

A first tenth of the time measures how fast the training is; it is stopped by SIGTERM, which saves
everything, and resumed from there with the number of epochs that fit. So nothing is thrown away,
and the learning rate falls to its end within the time.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.race.rows import FORWARD, ROOT, Run, usam_flags
from benchmarks.race.scores import Labels, predict_labels
from dataset import build_dataset
from usam.runtime.precision import select_precision
from usam.weights.inference import averaged
from usam.weights.usam import load_usam, read_checkpoint

STOPPED = 75  # u-sam.py's exit code after SIGTERM
PROBE, MARGIN = 0.1, 0.03  # shares of the time: to measure, and to leave unused
ENDLESS = 1_000_000  # epochs of the probe
TO_SAVE = 120  # seconds that a stopped process has to save


def train(run: Run, store: Path, folder: Path) -> dict[str, Any]:
    """Train within run.minutes; seconds, steps, epochs planned and done, and whether it was cut."""
    flags, limit = usam_flags(run, store, folder), run.minutes * 60
    start = time.monotonic()
    epochs = None
    if "--budget" in flags or "--epochs" in flags:
        code = _run(flags, folder, limit)
    else:
        ready = _probe(flags, folder, start, limit)
        epochs = fitting_epochs(
            read_checkpoint(folder / "last.pth"), slices=_slices(run, store), ready=ready,
            now=time.monotonic() - start, limit=limit,
        )  # fmt: skip
        resumed = [*flags, "--epochs", str(epochs), "--resume", str(folder / "last.pth")]
        code = _run(resumed, folder, limit - (time.monotonic() - start))
    seconds = time.monotonic() - start
    last = read_checkpoint(folder / "last.pth")
    batch = int(last["args"]["batch_size"])
    return {
        "seconds": round(seconds, 1),
        "steps": last["progress"]["samples"] // batch,
        "epochs": epochs or int(last["args"]["epochs"]),
        "epochs_done": last["progress"]["epoch"],
        "cut": code == STOPPED,
        "batch_size": batch,
        "img_size": last["data"]["img_size"],
        "best_epoch": last["best"]["epoch"],
    }


def predict(folder: Path, store: Path, split: str) -> Labels:
    """The labels of best.pth; of last.pth where the time did not reach the first validation."""
    path = folder / "best.pth"
    path = path if path.is_file() else folder / "last.pth"
    saved = averaged(read_checkpoint(path))
    data = build_dataset(
        "store", split, data_root=store, img_size=saved["data"]["img_size"],
        input_mode=saved["data"].get("input", "2d"),
    )  # fmt: skip
    model = load_usam(saved, path, None, merge=True)
    return predict_labels(model, data, select_precision("auto", torch.device("cpu")))


def fitting_epochs(
    saved: dict[str, Any], *, slices: tuple[int, int], ready: float, now: float, limit: float
) -> int:
    """Epochs that fit `limit`, at least 1, from a checkpoint stopped `now` seconds after the start.

    ready: seconds until the training could start, which resuming costs once more. slices: of
    training and of validation.
    """
    progress, (train_slices, val_slices) = saved["progress"], slices
    done = max(progress["samples"], 1)
    rate = (now - ready) / done  # seconds a slice, with the validations so far
    if not progress["epoch"]:
        rate *= 1 + FORWARD * val_slices / train_slices
    left = limit * (1 - MARGIN) - now - ready
    return max(1, int((done + left / rate) / train_slices))


def _slices(run: Run, store: Path) -> tuple[int, int]:
    """Numbers of slices to train and to validate on."""
    train, val = (len(build_dataset("store", split, data_root=store)) for split in ("train", "val"))
    return train, val


def _probe(flags: list[str], folder: Path, start: float, limit: float) -> float:
    """Train the first tenth of the time; seconds from `start` until the training began."""
    process = _start([*flags, "--epochs", str(ENDLESS)], folder)
    manifest = folder / "manifest.json"  # written when all is ready to train
    while not manifest.is_file() and process.poll() is None and time.monotonic() < start + limit:
        time.sleep(0.05)
    ready = time.monotonic() - start
    if not manifest.is_file() and process.poll() is None:
        process.kill()
        raise RuntimeError(f"the training had not started after {ready:.0f} s; give more --minutes")
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(limit * PROBE, 3))
    _check(_stop(process), folder)
    return ready


def _run(flags: list[str], folder: Path, seconds: float) -> int:
    """Exit code of u-sam.py, stopped after `seconds`."""
    process = _start(flags, folder)
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(seconds, 1))
    return _check(_stop(process), folder)


def _start(flags: list[str], folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / "u-sam.py"), *flags]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def _stop(process: subprocess.Popen) -> int:
    """Exit code, after SIGTERM if it still runs, and SIGKILL if it does not end."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(TO_SAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _check(code: int, folder: Path) -> int:
    """The exit code; stopped before it could note signals is stopped as well, if it had saved."""
    if code == -signal.SIGTERM and (folder / "last.pth").is_file():
        return STOPPED
    if code not in (0, STOPPED):
        raise RuntimeError(f"u-sam.py ended with {code}, see {folder / 'output.txt'}")
    return code
