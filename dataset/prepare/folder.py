"""What every prepared folder needs: no other files in the way, all cases tried, leftovers swept.

`prepare` uses it for slices, volume_packing for volumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dataset.parallel import each_case
from dataset.prepare.sources import class_table
from dataset.store.folder import Entry


def pack_all(work: Callable[[Any], Entry], jobs: Sequence[Any], workers: int) -> list[Entry]:
    """Entries of all cases in order of file name; every case is tried before any fault is told."""
    entries, faults = [], []
    for job, result in each_case(work, jobs, workers=workers, title="preparing"):
        if isinstance(result, Exception):
            faults.append((job.file, str(result)))
        else:
            entries.append(result)
    if faults:
        lines = "\n".join(f"  {text}" for _, text in sorted(faults))
        raise ValueError(
            f"{len(faults)} of {len(jobs)} cases cannot be packed; mend or remove them and run"
            f" again, finished cases are kept:\n{lines}"
        )
    return sorted(entries, key=lambda entry: entry["file"])


def check_names(jobs: Sequence[Any]) -> None:
    """Raises FileNotFoundError without any job, ValueError for two of one id or file name."""
    if not jobs:
        raise FileNotFoundError("no case has both an image and a label")
    for kind, names in (
        ("id", [job.case.id for job in jobs]),
        ("file", [job.file for job in jobs]),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            first = [job for job in jobs if twice[0] in (job.case.id, job.file)][:2]
            places = " and ".join(str(job.case.image) for job in first)
            raise ValueError(f"two cases of one {kind} {twice[0]!r}: {places}")


def check_output(output: Path) -> None:
    """Raises ValueError for a folder that holds anything but a store, begun or finished."""
    ours = {"cases", "index.json", "splits.json"}
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is not a folder; choose another --output")
    others = [path.name for path in output.iterdir()] if output.is_dir() else []
    others = [name for name in others if name not in ours and not name.startswith(".")]
    if others:
        raise ValueError(f"{output}: holds other things ({others[0]}); choose another --output")


def sweep(output: Path) -> None:
    """Takes away what a killed run left half written, and the index until the end."""
    (output / "cases").mkdir(parents=True, exist_ok=True)
    (output / "index.json").unlink(missing_ok=True)
    for folder in (output, output / "cases"):
        for path in folder.glob(".*"):
            if path.is_file() and path.name.rpartition(".")[2].isdigit():
                path.unlink()


def classes_seen(entries: list[Entry]) -> list[Entry]:
    """A table for labels that nobody named: class 1 to the highest id found."""
    highest = max(len(row) for entry in entries for row in entry["pixels"]) - 1
    if highest < 1:
        raise ValueError("no label holds anything but background")
    return class_table([f"class {number}" for number in range(1, highest + 1)])
