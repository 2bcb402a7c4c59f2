"""What can be wrong or odd about a prepared store of volumes: index, arrays, patients.

`verify` runs these; every array is read whole and measured against the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataset.store.volumes import VolumeStore, measured
from dataset.verify.scans import (
    Checked,
    Finding,
    StoreJob,
    check_counts,
    check_prepared,
    fingerprint,
    without_folder,
)


def check_volume_store(
    folder: Path, run: Callable[..., Iterator[Checked]]
) -> tuple[list[Finding], int]:
    """(findings, cases read) of a store; `run` maps check_volume over the jobs."""
    findings, cases, store = check_prepared(VolumeStore, folder, run, check_volume)
    if store:
        findings += _check_patients(store)
    return findings, len(cases)


def check_volume(job: StoreJob) -> Checked:
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
