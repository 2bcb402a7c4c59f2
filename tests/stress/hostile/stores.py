"""Small stores of slices and of volumes: how they are made, and read as training and verify do.

tests.stress.kinds breaks their files; so do tests of names that point outside.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dataset import SliceDataset, SliceStore, VolumeDataset, VolumeStore
from dataset.files import write_json
from dataset.splits import split_table
from dataset.store.slices import write_case, write_index
from dataset.store.volumes import write_volume, write_volume_index
from dataset.verify.stores import check_store


def made_in_memory(make: Callable[[Path], None], name: str) -> Any:
    """The content of a JSON file that `make` writes."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return json.loads((Path(folder) / name).read_bytes())


def make_slices(folder: Path) -> None:
    """A store of two cases of slices, with its splits."""
    cases = []
    for name, split in (("a", "train"), ("b", "test")):
        entry = {"id": name, "split": split, "file": name, "slices": [f"{name}{k}" for k in "012"]}
        image = np.full((3, 16, 16), ord(name), np.uint8)
        image[:, 0] = 0
        mask = np.pad(np.ones((3, 4, 4), np.uint8), ((0, 0), (4, 8), (4, 8)))
        cases.append(write_case(folder, entry | {"spacing": [3, 1, 1]}, image, mask))
    write_index(folder, {
        "dataset": "folder", "window": [-160, 240], "orientation": "LPS", "clahe": True,
        "source": "0", "spacing": None, "cases": cases,
        "classes": [{"id": i, "name": n, "color": "#00ff00"} for i, n in enumerate(("b", "a"))],
    })  # fmt: skip
    table = split_table([("a", "train"), ("b", "test")], folds=None, seed=0)
    write_json(folder / "splits.json", table)


def make_volumes(folder: Path) -> None:
    """A store of one volume."""
    mask = np.pad(np.ones((4, 4, 4), np.uint8), 2)
    entry = {"id": "a", "split": "train", "file": "a"}
    case = write_volume(folder, entry, np.zeros((8, 8, 8), np.int16), mask)
    rows = [{"id": 0, "name": "background"}, {"id": 1, "name": "a"}]
    write_volume_index(folder, {"dataset": "x", "classes": rows, "cases": [case], "source": "0"})


def make_nnunet(folder: Path) -> None:
    """The folders that go with a dataset.json; names are all that is read."""
    for path in ("imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()


def read_slices(folder: Path) -> Any:
    """Every training slice of a store, as training takes it, and what a checkpoint keeps of it."""
    store = SliceStore(folder)
    data = SliceDataset(store, store.slices("train"), img_size=16)
    return [data[k, 1] for k in range(len(data))], data.info, data.showcase(2), data.case_ids


def read_volumes(folder: Path) -> Any:
    """Every object of a volume store, as training takes it, and what a checkpoint keeps of it."""
    store = VolumeStore(folder)
    objects = [(n, label) for n, case in enumerate(store.cases) for label in case["objects"]]
    data = VolumeDataset(store, objects, side=8)
    return [data[k, 1] for k in range(len(data))], data.info, data.skipped, data.case_ids


def verified(folder: Path) -> Any:
    """What `verify` finds in a store; raises ValueError of its first fault where there is one."""

    def run(work: Callable[[Any], Any], jobs: Any) -> Any:
        return map(work, jobs)

    findings, _ = check_store(SliceStore, folder, run)
    wrong = [finding for finding in findings if finding.level == "error"]
    if wrong:
        raise ValueError(f"{wrong[0].file}: {wrong[0].what}")
    return findings
