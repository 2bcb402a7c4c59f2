"""The output folder of a training run: its log, its manifest and files of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dataset.files import locked, sweep, write_text
from usam.runtime.processes import is_main
from usam.training import manifest
from usam.training.checkpoint import backups

RUN_FILES = (
    "best.pth", "last.pth", "log.jsonl", "manifest.json", "curves.png", "tensorboard",
    "metrics.json", "report", "overlays",
)  # fmt: skip


def training_lock(path: Path) -> AbstractContextManager[None]:
    """Context manager: the main process locks a run's folder against other trainings.

    Raises ValueError naming the process that trains there. Evaluation and prediction do not ask.
    """
    return locked(path, "training") if is_main() else nullcontext()


def remove_unfinished(path: Path) -> None:
    """Remove files left in the folder by a run that was killed while saving."""
    sweep(path)
    for unfinished in path.glob(".*.pth.*.tmp"):
        unfinished.unlink()


class RunFolder:
    """log.jsonl and manifest.json of a run; only the main process writes.

    A fresh run moves an earlier run's files to previous-N; a run resumed from a checkpoint of
    this folder keeps them and cuts the log back to the epochs before `first_epoch`.
    """

    def __init__(self, path: Path, resumed_from: Path | None, first_epoch: int) -> None:
        self.path, self.log_file = path, path / "log.jsonl"
        self._continues = (
            resumed_from is not None and resumed_from.resolve().parent == path.resolve()
        )
        if not is_main():
            return
        path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path)
        if not self._continues:
            self._move_aside()
        elif self.log_file.exists():
            self._cut_log(first_epoch)

    def _cut_log(self, first_epoch: int) -> None:
        """Keep the log's epochs before `first_epoch`; a line cut short by a kill is dropped."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.splitlines() if _epoch_of(line) < first_epoch]
        write_text(self.log_file, "".join(line + "\n" for line in kept))

    def _move_aside(self) -> None:
        files = [self.path / name for name in RUN_FILES if (self.path / name).exists()]
        files += backups(self.path / "best.pth") + backups(self.path / "last.pth")
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
        """Write manifest.json: flags, data and versions, and where and when the run was started."""
        if is_main():
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            path = self.path / "manifest.json"
            manifest.write(path, facts, {"time": now, **start}, continues=self._continues)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one epoch's figures to log.jsonl; strict JSON, so NaN raises ValueError."""
        if is_main():
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


def _epoch_of(line: str) -> int:
    """The epoch of a log line; a very large number if the line is cut short or damaged."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 2**63
