"""Checks of a prepared store, of slices or volumes: index, arrays, records, splits.

Every array is read whole and compared with the index.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import SCRATCH, array_digest
from dataset.labels import check_label_ids
from dataset.splits import person
from dataset.store.folder import KINDS, MAX_INDEX_BYTES, SPLITS, Store
from dataset.store.slices import SliceStore
from dataset.store.volumes import measured
from dataset.text import counted
from dataset.verify.scans import Checked, Finding, check_counts, compare_cases

PARTIAL = ("care", "phantom")  # sources that hold cases without foreground on purpose
MIN_GREYS = 16  # a window that leaves fewer does not suit its scan
MAX_WHITE = 0.95  # of the pixels that are not black


@dataclass(frozen=True)
class StoreJob:
    """One case of a prepared store, by its position in the index."""

    kind: type[Store]
    folder: Path
    number: int


def check_store(
    kind: type[Store], folder: Path, run: Callable[..., Iterator[Checked]]
) -> tuple[list[Finding], int]:
    """(findings, cases read) of a store of that kind; `run` maps check_case over the jobs."""
    try:
        store = kind(folder)
    except (ValueError, OSError) as error:
        return [Finding("error", "index.json", without_folder(error, folder))], 0
    cases = list(run(check_case, [StoreJob(kind, folder, n) for n in range(len(store.cases))]))
    findings = [finding for case in cases for finding in case.findings]
    findings += [*compare_cases(cases), *_unknown_files(store), *_check_patients(store)]
    if kind is SliceStore:
        findings += [*_check_names(store), *_check_splits(store)]
    return findings, len(cases)


def check_case(job: StoreJob) -> Checked:
    """Both arrays of one case against its entry in the index."""
    store = job.kind(job.folder)
    case = store.cases[job.number]
    checked = Checked(case["id"], case["split"], f"cases/{case['file']}")
    try:
        image, mask = store.arrays(job.number)
        check_label_ids(mask, len(store.classes), "mask")
    except (ValueError, OSError) as error:
        checked.error(without_folder(error, job.folder))
        return checked
    for name, array in zip(KINDS, (image, mask), strict=True):
        if case.get("digests") and case["digests"].get(name) != array_digest(array):
            checked.error(f"the {name} is not the one that the index describes; prepare it again")
    _check_record(checked, store, case)
    partial = store.index.get("dataset") in PARTIAL
    counts = np.bincount(mask.ravel(), minlength=len(store.classes))
    check_counts(checked, counts, may_be_empty=partial)
    check = _check_slices if job.kind is SliceStore else _check_volume
    check(checked, case, image, mask)
    checked.fingerprint = array_digest(image)
    if image.min() == image.max():
        checked.warning(f"every voxel is {image.min()}")
    return checked


def _check_record(checked: Checked, store: Store, case: dict[str, Any]) -> None:
    """Whether a case's record, if it has one, agrees with the index."""
    try:
        record = json.loads((store.folder / "cases" / f"{case['file']}.json").read_bytes())
        same = record["key"] == case["source"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, OSError):
        same = False
    if not same:
        checked.error("its record is of another run than the index; prepare it again")


def _check_slices(
    checked: Checked, case: dict[str, Any], image: np.ndarray, mask: np.ndarray
) -> None:
    if case.get("spacing"):
        z, y, x = case["spacing"]
        sizes = np.linalg.norm(np.array(case.get("affine") or np.diag([x, y, z, 1])), axis=0)[:3]
        if not np.allclose(sorted(sizes), sorted((z, y, x)), rtol=0.01):
            checked.error(f"spacing {z:g} {y:g} {x:g} mm, but its affine has voxels of "
                          f"{' x '.join(f'{size:.4g}' for size in sizes)} mm")  # fmt: skip
        checked.spacing = z, (y * x) ** 0.5
    pixels = [np.bincount(plane.ravel(), minlength=len(case["pixels"][0])) for plane in mask]
    if np.array(pixels).tolist() != case["pixels"]:
        checked.error("the mask's pixel counts differ from those in the index")
    greys = np.bincount(image.ravel(), minlength=256)
    number, not_black = int(np.count_nonzero(greys)), int(greys[1:].sum())
    if 1 < number < MIN_GREYS:
        checked.warning(f"only {counted(number, 'grey value')}; does the window suit the scan?")
    elif number > 1 and greys[255] > MAX_WHITE * not_black:
        checked.warning(f"{greys[255] / not_black:.0%} of all pixels above black are white")


def _check_volume(
    checked: Checked, case: dict[str, Any], image: np.ndarray, mask: np.ndarray
) -> None:
    if measured(mask) != (case["boxes"], case["pixels"]):
        checked.error("the mask's objects differ from those in the index")
    if not np.isfinite(image).all():
        checked.error("values that are not finite")


def _unknown_files(store: Store) -> Iterator[Finding]:
    """Files among the arrays of a store that belong to none of its cases."""
    known = {case["file"] for case in store.cases}
    for path in sorted((store.folder / "cases").iterdir()):
        stem = path.name.removesuffix(".npy").removesuffix(".image").removesuffix(".mask")
        if stem.removesuffix(".json") not in known and not path.name.startswith(SCRATCH):
            yield Finding("warning", f"cases/{path.name}", "is not in the index")


def _check_patients(store: Store) -> Iterator[Finding]:
    first: dict[str, dict[str, Any]] = {}
    for case in store.cases:
        other = first.setdefault(person(case), case)
        if "patient" in case and other["split"] != case["split"]:
            what = f"patient {case['patient']} is in {case['split']} and in {other['split']}"
            yield Finding("error", f"cases/{case['file']}", what)


def _check_names(store: Store) -> Iterator[Finding]:
    names = Counter(name for case in store.cases for name in case["slices"])
    for name, count in names.items():
        if count > 1:
            yield Finding("error", "index.json", f"{count} slices are named {name!r}")


def _check_splits(store: Store) -> Iterator[Finding]:
    path = store.folder / "splits.json"
    if not path.is_file():
        return
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"larger than {MAX_INDEX_BYTES >> 20} MiB")
        table = json.loads(path.read_bytes())
        whole = {split: _ids(table[split]) for split in SPLITS}
        folds = [(_ids(fold["train"]), _ids(fold["val"])) for fold in table.get("folds", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield Finding("error", path.name, f"not a table of splits ({error!r:.80})")
        return
    for split, ids in whole.items():
        stored = {case["id"] for case in store.cases if case["split"] == split}
        for what, cases in (("names", ids - stored), ("leaves out", stored - ids)):
            if cases:
                named = ", ".join(sorted(cases)[:5])
                yield Finding("error", path.name, f"{split} {what} {named:.200}, unlike the index")
    for number, (train, val) in enumerate(folds):
        if train & val or train | val != whole["train"]:
            yield Finding("error", path.name, f"fold {number} does not divide the training cases")


def _ids(value: object) -> set[str]:
    """The case ids of a list of texts; raises TypeError for anything else."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TypeError(f"expected a list of case ids, found {value!r:.40}")
    return set(value)


def without_folder(error: object, folder: Path) -> str:
    """An error's text on one line, without the folder that the reader already knows."""
    return " ".join(str(error).replace(f"{folder}/", "").split())
