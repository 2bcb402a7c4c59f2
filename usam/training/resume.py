"""Which checkpoint a run goes on from, and the best.pth that its best score belongs to.

u-sam.py asks `choose` before anything is built; training.py asks `best_so_far`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.files import atomic_write
from usam.cli.choices import AUTO
from usam.runtime.processes import from_main, say
from usam.training import checkpoint
from usam.training.checkpoint import predecessor, predecessors
from usam.weights.usam import read_checkpoint

NONE, ALL_DAMAGED = -1, -2  # instead of a place among the predecessors


def choose(
    resume: Path | None, folder: Path, sam_weight: str | None = None, *, more: bool = False
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that --resume names and what it holds; (None, None) for a fresh start.

    `auto` is the newest sound one of last.pth and its predecessors in `folder`. The main process
    chooses for all; it says which ones are damaged and sets them aside as NAME.damaged. Raises
    ValueError if all are damaged: no run is started over in silence; or if a checkpoint that needs
    none is named beside a --sam_weight, which one of several (`more`) may need. Errors of
    read_checkpoint.
    """
    if resume is None:
        return None, None
    if resume != AUTO:
        saved = read_checkpoint(resume)
        if sam_weight not in (None, "none") and not (more or saved["data"].get("base")):
            raise ValueError(
                f"--sam_weight {sam_weight} is for a fresh start, and --resume {resume} is none; "
                "give one of them"
            )
        return resume, saved
    last, saved = folder / "last.pth", None

    def ask() -> int:
        nonlocal saved
        number, saved = newest_sound(last)
        return number

    number = from_main(ask)
    if number == NONE:
        say(f"--resume auto: no checkpoint in {folder}, so this is a fresh start")
        return None, None
    if number == ALL_DAMAGED:
        raise ValueError(f"--resume auto: every last*.pth in {folder} is damaged; see above")
    path = predecessor(last, number) if number else last
    say(f"--resume auto: goes on from {path}")
    return path, saved or read_checkpoint(path)


def newest_sound(last: Path) -> tuple[int, dict[str, Any] | None]:
    """0 if `last` is sound, else the number of its newest sound predecessor, and what it holds.

    NONE or ALL_DAMAGED, and None, where there is none. Raises ValueError or OSError where a file
    could not be read, which says nothing of the file.
    """
    found = [path for path in (last, *predecessors(last)) if path.exists()]
    damaged = []
    for path in found:
        try:
            saved = read_checkpoint(path)
        except ValueError as error:
            if isinstance(error.__cause__, OSError | MemoryError):
                raise  # the disk's or the machine's fault: the file may be sound
            print(f"warning: {error}", flush=True)
            damaged.append(path)
            continue
        for other in damaged:  # or the next save would make it a predecessor
            with contextlib.suppress(OSError):
                other.rename(other.with_name(f"{other.name}.damaged"))
        return checkpoint.number_of(last, path), saved
    return (ALL_DAMAGED if found else NONE), None


def best_so_far(best: Mapping[str, Any], resumed_from: Path | None, folder: Path) -> dict[str, Any]:
    """The best score to beat: `best`, if its best.pth is in `folder`, or can be copied there.

    A run that goes on in another folder takes along the best.pth beside `resumed_from`. Where
    there is none, the next epoch is the best, and that is said: a score without a file would
    leave the folder without a best.pth for as long as nothing beats it.
    """
    blank = {"epoch": None, "mean_dice": None}
    if resumed_from is None or best["epoch"] is None:
        return blank
    if from_main(lambda: int(bring_best(best, resumed_from.resolve().parent, folder))):
        return dict(best)
    say(f"the best.pth of epoch {best['epoch']} is not there: the best is looked for anew")
    return blank


def bring_best(best: Mapping[str, Any], source: Path, folder: Path) -> bool:
    """Whether `folder` holds a best.pth to go with `best`, copied from `source` if need be."""
    target = folder / "best.pth"
    if source.resolve() == folder.resolve():
        return target.exists()
    for path in (source / "best.pth", *predecessors(source / "best.pth")):
        with contextlib.suppress(ValueError, OSError):
            if read_checkpoint(path)["best"] == best:
                with atomic_write(target) as scratch:
                    shutil.copyfile(path, scratch)
                print(f"took {path} along", flush=True)
                return True
    return False
