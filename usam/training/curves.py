"""Curves of a run, updated while it trains: curves.png and, with --tensorboard, TensorBoard.

training.py tells it of every epoch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from usam.runtime.figures import draw_run_curves
from usam.runtime.processes import is_main

SHARE = 0.1  # of the time that drawing may take


class RunCurves:
    """Draws curves.png of log.jsonl in `folder` and writes `folder`/tensorboard; rank 0 only.

    A drawing takes a third of a second; where epochs are so short that this would be more than a
    tenth of the time, some are passed over, but never the last. first_epoch: the one that
    comes next; TensorBoard forgets what it knows of it and later ones. Raises ValueError where
    `tensorboard` is wanted and not installed (see `summary_writer`).
    """

    def __init__(self, folder: Path, *, tensorboard: bool, first_epoch: int) -> None:
        self.folder = folder
        self._cost, self._drawn = 0.0, time.perf_counter()
        self._writer = None
        if tensorboard and is_main():
            self._writer = summary_writer()(str(folder / "tensorboard"), purge_step=first_epoch)

    def add(self, line: Mapping[str, Any], *, last: bool) -> None:
        """Draw the epoch of `line`, which is already in log.jsonl; `last`: it is the final one."""
        if not is_main():
            return
        if self._writer:
            for name, value in scalars(line).items():
                self._writer.add_scalar(name, value, line["epoch"])
            self._writer.flush()
        started = time.perf_counter()
        if last or self._cost <= SHARE * (started - self._drawn):
            self._draw()
            self._drawn = time.perf_counter()
            self._cost = self._drawn - started
        if last and self._writer:
            self._writer.close()

    def _draw(self) -> None:
        """Draw the file atomically: a viewer always sees a complete one."""
        lines = [
            json.loads(line)
            for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        draw_run_curves(self.folder / "curves.png", lines)


def summary_writer() -> type:
    """TensorBoard's writer, an optional extra. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        reason = f"--tensorboard needs TensorBoard ({error}): pip install tensorboard"
        raise ValueError(reason) from None
    return SummaryWriter


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an epoch that are not None, by the names TensorBoard groups them by."""
    named = {"loss": line["loss"], "learning_rate": line["lr"]}
    if line.get("val"):
        named |= {f"dice/{name}": value for name, value in line["val"]["dice"].items()}
        named["dice/mean"] = line["val"]["mean_dice"]
    return {name: value for name, value in named.items() if value is not None}
