"""What can be wrong or odd about a prepared slice store: index, arrays, splits.

`verify` runs these; every array is read whole and counted against the index.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dataset.store.folder import MAX_INDEX_BYTES
from dataset.store.slices import SliceStore
from dataset.verify.scans import (
    Checked,
    Finding,
    StoreJob,
    check_counts,
    check_prepared,
    fingerprint,
    without_folder,
)

PARTIAL = ("care", "phantom")  # sources that hold cases without foreground on purpose


def check_store(folder: Path, run: Callable[..., Iterator[Checked]]) -> tuple[list[Finding], int]:
    """(findings, cases read) of a store; `run` maps check_case over the jobs."""
    findings, cases, store = check_prepared(SliceStore, folder, run, check_case)
    if store:
        findings += [*_check_names(store), *_check_splits(store)]
    return findings, len(cases)


def check_case(job: StoreJob) -> Checked:
    """Both arrays of one case against its entry in the index."""
    store = SliceStore(job.folder)
    case = store.cases[job.number]
    checked = Checked(case["id"], case["split"], f"cases/{case['file']}")
    if case.get("spacing"):
        z, y, x = case["spacing"]
        checked.spacing = z, (y * x) ** 0.5
    try:
        planes = [store.read(job.number, k) for k in range(case["shape"][0])]
    except (ValueError, OSError) as error:
        checked.wrong(without_folder(error, job.folder))
        return checked
    counts = [np.bincount(mask.ravel(), minlength=len(store.classes)) for _, mask in planes]
    if any(count.tolist() != row for count, row in zip(counts, case["pixels"], strict=True)):
        checked.wrong("the mask does not hold the voxels that the index counts")
    partial = store.index.get("dataset") in PARTIAL
    check_counts(checked, np.sum(counts, axis=0), may_be_empty=partial)
    images = np.stack([image for image, _ in planes])
    checked.fingerprint = fingerprint(images)
    if images.min() == images.max():
        checked.odd(f"every pixel is {images.min()}; is the window right?")
    return checked


def _check_names(store: SliceStore) -> Iterator[Finding]:
    names = Counter(name for case in store.cases for name in case["slices"])
    for name, count in names.items():
        if count > 1:
            yield Finding("wrong", "index.json", f"{count} slices are named {name!r}")


def _check_splits(store: SliceStore) -> Iterator[Finding]:
    path = store.folder / "splits.json"
    if not path.is_file():
        return
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"larger than {MAX_INDEX_BYTES >> 20} MiB")
        table = json.loads(path.read_bytes())
        whole = {split: _ids(table[split]) for split in ("train", "val", "test")}
        folds = [(_ids(fold["train"]), _ids(fold["val"])) for fold in table.get("folds", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield Finding("wrong", path.name, f"not a table of splits ({error!r:.80})")
        return
    for split, ids in whole.items():
        stored = {case["id"] for case in store.cases if case["split"] == split}
        for what, cases in (("names", ids - stored), ("leaves out", stored - ids)):
            if cases:
                named = ", ".join(sorted(cases)[:5])
                yield Finding("wrong", path.name, f"{split} {what} {named:.200}, unlike the index")
    for number, (train, val) in enumerate(folds):
        if train & val or train | val != whole["train"]:
            yield Finding("wrong", path.name, f"fold {number} does not divide the training cases")


def _ids(value: object) -> set[str]:
    """The case ids of a list of texts; raises TypeError for anything else."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TypeError(f"a list of case ids wanted, found {value!r:.40}")
    return set(value)
