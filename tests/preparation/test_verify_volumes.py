"""dataset.verify on prepared volumes: a sound store passes, planted faults are named.

The store is one that dataset.prepare made from drawn pairs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset.prepare.command import main as prepare
from dataset.verify.command import main, verify
from tests.helpers.volume_layouts import SPACING, blob


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A store of three small cases."""
    root = tmp_path_factory.mktemp("volumes")
    for number in range(3):
        image, label, affine = blob((40, 34, 26), SPACING, seed=number)
        for kind, array in (("images", image), ("labels", label)):
            (root / "raw" / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), root / "raw" / kind / f"c{number}.nii.gz")
    flags = ["--input", str(root / "raw"), "--output", str(root / "store"), "--workers", "1"]
    assert prepare(["volumes", *flags, "--classes", "one", "two", "--min_volume", "0.1"]) == 0
    return root / "store"


def array(change: Callable[[np.ndarray], None], kind: str = "mask") -> Callable[[Path], None]:
    """Changes an array of the first case in place, on the disk."""

    def plant(store: Path) -> None:
        path = sorted((store / "cases").glob(f"*.{kind}.npy"))[0]
        values = np.load(path)
        change(values)
        np.save(path, values)

    return plant


def index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Changes the index's text."""

    def plant(store: Path) -> None:
        table = json.loads((store / "index.json").read_text(encoding="utf-8"))
        change(table)
        (store / "index.json").write_text(json.dumps(table), encoding="utf-8")

    return plant


def truncate(store: Path) -> None:
    """Cuts the first image short."""
    path = sorted((store / "cases").glob("*.image.npy"))[0]
    path.write_bytes(path.read_bytes()[:-500])


FAULTS = {
    "a label moved": (array(lambda m: m.__setitem__(0, 1)), "those in the index"),
    "a label beyond the table": (array(lambda m: m.__setitem__((0, 0, 0), 9)), "class table"),
    "an emptied label": (array(lambda m: m.fill(0)), "empty label"),
    "an image cut short": (truncate, "bytes"),
    "a patient in two splits": (
        index(lambda t: t["cases"][0].update(patient="p", split="test")
              or t["cases"][1].update(patient="p")),
        "patient p is in",
    ),
    "an object without a box": (
        index(lambda t: t["cases"][0]["boxes"].clear()), "has no box inside the volume"
    ),
}  # fmt: skip


def test_a_sound_store_passes(clean, capsys):
    assert main([str(clean), "--workers", "1"]) == 0
    assert "volumes: 3 cases read, 0 errors and 0 warnings" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(clean, tmp_path, name):
    plant, wanted = FAULTS[name]
    store = tmp_path / "store"
    shutil.copytree(clean, store)
    plant(store)
    layout, findings, _ = verify(store)
    assert layout == "volumes"
    assert any(f.level == "error" and wanted in f.what for f in findings), findings


def test_a_constant_image_and_a_stray_file_are_warnings(clean, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(clean, store)
    array(lambda image: image.fill(7), "image")(store)
    (store / "cases" / "stray.npy").write_bytes(b"")
    found = [f.what for f in verify(store)[1] if f.level == "warning"]
    assert found == ["every voxel is 7", "is not in the index"]
