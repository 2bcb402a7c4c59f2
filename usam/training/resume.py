"""Which checkpoint a run resumes from, and the best.pth that its best score belongs to."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.files import atomic_write
from usam.cli.choices import AUTO
from usam.runtime.processes import from_main, say
from usam.training.checkpoint import backup, backups, number_of
from usam.weights.usam import read_checkpoint

NONE, ALL_DAMAGED = -1, -2  # instead of the number of a backup


def find_checkpoint(
    resume: Path | None, folder: Path, sam_weight: str | None = None, *, more: bool = False
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that --resume names and its content; (None, None) for a fresh start.

    `auto` is the newest undamaged one of last.pth and its backups in `folder`. The main process
    chooses for all; it prints which ones are damaged and renames them to NAME.damaged. Raises
    ValueError if all are damaged, since a run never starts over unnoticed; or if a checkpoint that
    needs no --sam_weight is given with one, unless one of several (`more`) may need it. Errors of
    read_checkpoint.
    """
    if resume is None:
        return None, None
    if resume != AUTO:
        saved = read_checkpoint(resume)
        if sam_weight not in (None, "none") and not (more or saved["data"].get("base")):
            raise ValueError(
                f"--sam_weight {sam_weight} is for a fresh start, --resume {resume} is not; "
                "pass one of them"
            )
        return resume, saved
    last, saved = folder / "last.pth", None

    def ask() -> int:
        nonlocal saved
        number, saved = newest_undamaged(last)
        return number

    number = from_main(ask)
    if number == NONE:
        say(f"--resume auto: no checkpoint in {folder}, starting a new run")
        return None, None
    if number == ALL_DAMAGED:
        raise ValueError(f"--resume auto: every last*.pth in {folder} is damaged; see above")
    path = backup(last, number) if number else last
    say(f"--resume auto: resuming from {path}")
    return path, saved or read_checkpoint(path)


def newest_undamaged(last: Path) -> tuple[int, dict[str, Any] | None]:
    """0 if `last` is undamaged, else the number of its newest undamaged backup, and its content.

    NONE or ALL_DAMAGED, and None, where there is none. Raises ValueError or OSError where a file
    could not be read for another reason.
    """
    found = [path for path in (last, *backups(last)) if path.exists()]
    damaged = []
    for path in found:
        try:
            saved = read_checkpoint(path)
        except ValueError as error:
            if isinstance(error.__cause__, OSError | MemoryError):
                raise  # the disk's or the machine's fault: the file may be undamaged
            print(f"warning: {error}", flush=True)
            damaged.append(path)
            continue
        for other in damaged:  # or the next save would make it a backup
            with contextlib.suppress(OSError):
                other.rename(other.with_name(f"{other.name}.damaged"))
        return number_of(last, path), saved
    return (ALL_DAMAGED if found else NONE), None


def best_so_far(best: Mapping[str, Any], resumed_from: Path | None, folder: Path) -> dict[str, Any]:
    """The best score to beat: `best`, if its best.pth is in `folder`, or can be copied there.

    A run resumed into another folder copies the best.pth beside `resumed_from`. Where there is
    none, the next epoch is the best, and this is printed: a score without a file would leave the
    folder without a best.pth until an epoch beats it.
    """
    blank = {"epoch": None, "mean_dice": None}
    if resumed_from is None or best["epoch"] is None:
        return blank
    if from_main(lambda: int(copy_best(best, resumed_from.resolve().parent, folder))):
        return dict(best)
    say(f"best.pth (epoch {best['epoch']}) not found in {resumed_from.parent}; best score reset")
    return blank


def copy_best(best: Mapping[str, Any], source: Path, folder: Path) -> bool:
    """Whether `folder` holds the best.pth of `best`, copied from `source` if need be."""
    target = folder / "best.pth"
    if source.resolve() == folder.resolve():
        return target.exists()
    for path in (source / "best.pth", *backups(source / "best.pth")):
        with contextlib.suppress(ValueError, OSError):
            if read_checkpoint(path)["best"] == best:
                with atomic_write(target) as scratch:
                    shutil.copyfile(path, scratch)
                print(f"copied {path} to {folder}", flush=True)
                return True
    return False
