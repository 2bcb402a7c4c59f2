"""What can be wrong or odd about a prepared store of volumes: index, arrays, patients.

`verify` runs these; every array is read whole and measured against the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.checks import (
    Checked,
    Finding,
    check_counts,
    compare_cases,
    fingerprint,
    unknown_files,
    without_folder,
)
from dataset.volume_store import VolumeStore, measured


@dataclass(frozen=True)
class VolumeJob:
    """One case of a store, by its place in the index."""

    folder: Path
    number: int


def check_volume_store(
    folder: Path, run: Callable[..., Iterator[Checked]]
) -> tuple[list[Finding], int]:
    """(findings, cases read) of a store; `run` maps check_volume over the jobs."""
    try:
        store = VolumeStore(folder)
    except (ValueError, OSError) as error:
        return [Finding("wrong", "index.json", without_folder(error, folder))], 0
    cases = list(run(check_volume, [VolumeJob(folder, n) for n in range(len(store.cases))]))
    findings = [finding for case in cases for finding in case.findings]
    findings += compare_cases(cases)
    findings += unknown_files(store.folder, store.cases)
    findings += _check_patients(store)
    return findings, len(cases)


def check_volume(job: VolumeJob) -> Checked:
    """Both arrays of one case against its entry in the index."""
    store = VolumeStore(job.folder)
    case = store.cases[job.number]
    checked = Checked(case["id"], case["split"], f"cases/{case['file']}")
    try:
        image, mask = store.read(job.number)
    except (ValueError, OSError) as error:
        checked.wrong(without_folder(error, job.folder))
        return checked
    counts = np.bincount(mask.ravel(), minlength=len(store.classes))
    if len(counts) > len(store.classes):
        checked.wrong(f"label {len(counts) - 1} is not in the class table")
    elif measured(mask) != (case["boxes"], case["pixels"]):
        checked.wrong("the mask does not hold the objects that the index measures")
    check_counts(checked, counts)
    if not np.isfinite(image).all():
        checked.wrong("values that are not finite")
    elif image.min() == image.max():
        checked.odd(f"every voxel is {image.min()}")
    checked.fingerprint = fingerprint(image)
    return checked


def _check_patients(store: VolumeStore) -> Iterator[Finding]:
    first: dict[str, Any] = {}
    for case in store.cases:
        other = first.setdefault(case["patient"], case)
        if other["split"] != case["split"]:
            what = f"patient {case['patient']} is in {case['split']} and in {other['split']}"
            yield Finding("wrong", f"cases/{case['file']}", what)
