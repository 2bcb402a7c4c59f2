"""The folder of a run: its log, its checkpoints and what an earlier run left there.

u-sam.py opens one on rank 0 for each training run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.files import sweep, write_text
from usam.runtime.processes import is_main
from usam.training import checkpoint, manifest
from usam.training.checkpoint import BackgroundSaver, predecessors
from usam.training.ema import WeightAverage
from usam.training.engine import Progress
from usam.weights.checkpoint_parts import FORMAT
from usam.weights.inference import averaged
from usam.weights.small_checkpoint import without_base

RUN_FILES = (
    "best.pth", "last.pth", "log.jsonl", "manifest.json", "curves.png", "tensorboard",
    "metrics.json", "report", "overlays",
)  # fmt: skip
ONLY_TO_GO_ON = ("optimizer", "scaler", "rng", "in_epoch", "unvalidated")  # left out of best.pth


class RunFolder:
    """best.pth, last.pth, log.jsonl and manifest.json of a run; only the main process writes.

    A fresh run moves an earlier one's files to previous-N; a run resumed from a checkpoint of
    this folder keeps them and cuts the log back to the epochs before `first_epoch`.
    keep: predecessors of best.pth and last.pth that stay.
    """

    def __init__(
        self, path: Path, resumed_from: Path | None, first_epoch: int, *, keep: int = 0
    ) -> None:
        self.path, self.log_file = path, path / "log.jsonl"
        self._saver = BackgroundSaver(keep)
        self._goes_on = resumed_from is not None and resumed_from.resolve().parent == path.resolve()
        if not is_main():
            return
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)
        for unfinished in path.glob(".*.pth.*.tmp"):  # of a run killed while it was saving
            unfinished.unlink()
        if not self._goes_on:
            self._move_aside()
        elif self.log_file.exists():
            lines = self.log_file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _epoch_of(line) < first_epoch]
            write_text(self.log_file, "".join(line + "\n" for line in kept))

    def _move_aside(self) -> None:
        files = [self.path / name for name in RUN_FILES if (self.path / name).exists()]
        files += predecessors(self.path / "best.pth") + predecessors(self.path / "last.pth")
        if not files:
            return
        number = 1
        while (self.path / f"previous-{number}").exists():
            number += 1
        target = self.path / f"previous-{number}"
        target.mkdir()
        for file in files:
            file.rename(target / file.name)
        print(f"moved an earlier run's files to {target}")

    def describe(self, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Write manifest.json: what the run is made from, and where and when it was started."""
        if is_main():
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            path = self.path / "manifest.json"
            manifest.write(path, facts, {"time": now, **start}, goes_on=self._goes_on)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one epoch's figures to log.jsonl; strict JSON, so NaN raises ValueError."""
        if is_main():
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def save(self, state: Callable[[], dict[str, Any]], *, as_best: bool, may_skip: bool) -> None:
        """Save what `state` gives as last.pth and, with `as_best`, as best.pth too.

        Returns once the state is copied. With `may_skip` it is passed over where epochs are so
        short that writing would take more than a tenth of the time; a later one is then saved.
        """
        if not is_main() or (may_skip and not self._saver.is_due):
            return
        whole = state()
        files = {self.path / "last.pth": whole}
        if as_best:  # written first: a kill in between repeats an epoch, but never loses the best
            kept = averaged(whole)
            weights = {key: value for key, value in kept.items() if key not in ONLY_TO_GO_ON}
            files = {self.path / "best.pth": weights, **files}
        self._saver.submit(files)

    def finish(self) -> None:
        """Return when everything submitted is on the disk; raises OSError where it cannot be."""
        self._saver.finish()


def run_state(
    *,
    flags: Mapping[str, Any],
    data: Mapping[str, Any],
    model: nn.Module,
    progress: Progress,
    best: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage,
    facts: Mapping[str, Any],
    begun: Mapping[str, Any] | None = None,
    line: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All a checkpoint holds: enough to go on exactly, and to predict without the flags.

    flags: by name, kept as plain types. data: what a model must know of its data (classes,
    img_size, window, orientation, spacing, prompt_mode). best: epoch and score of the best so far.
    average: kept where there is one; best.pth holds it in place of the last weights. facts: of
    usam.manifest. begun: sums of an epoch that is not done; line: figures of one still to validate.
    """
    state = {
        "format": FORMAT,
        "model": without_base(model.state_dict()) if data.get("base") else model.state_dict(),
        "args": manifest.plain(flags),
        "data": dict(data),
        "progress": vars(progress).copy(),
        "best": dict(best),
        "manifest": {key: v for key, v in facts.items() if key not in ("arguments", "data")},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": checkpoint.random_state(),
    }
    state |= {"average": average.state_dict()} if average.weights else {}
    state |= {"in_epoch": dict(begun)} if begun else {}
    return state | ({"unvalidated": dict(line)} if line else {})


def _epoch_of(line: str) -> int:
    """The epoch of a log line; one that a kill cut short counts as never written."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 2**63
