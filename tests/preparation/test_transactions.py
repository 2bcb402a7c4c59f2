"""Preparing over an older store: failed runs leave it, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset import SliceStore, build_dataset
from dataset.prepare.command import main
from dataset.verify.command import verify
from tests.helpers import layouts
from tests.stress.prepare import content, run_interruptions


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments), "--workers", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    return "\n".join(line for line in lines if "case/s" not in line)


def folders(root: Path, scale: float = 1.0, label_scale: int = 1) -> tuple[object, ...]:
    """Flags for two scans with binary labels below a folder."""
    for number in (1, 2):
        image, label = layouts.scan(number, 2)
        layouts.write(root / "images" / f"case{number}.nii", (image * scale).astype(np.float32))
        layouts.write(root / "labels" / f"case{number}.nii", label * np.uint8(label_scale))
    return "folder", "--input", root


def test_an_interrupted_run_leaves_the_old_store_or_the_new_one() -> None:
    row = run_interruptions(6)
    assert row.faults == []


def test_a_failed_run_leaves_the_old_store_as_it_was(tmp_path: Path, capsys) -> None:
    flags = (*folders(tmp_path / "in"), "--output", tmp_path / "store")
    assert main([*map(str, flags), "--workers", "1"]) == 0
    before = content(tmp_path / "store")
    assert "two classes named 'a'" in refused(capsys, *flags, "--classes", "a", "a")
    assert "named 'Background'" in refused(capsys, *flags, "--classes", "Background")
    (tmp_path / "in" / "images" / "case2.nii").write_bytes(b"x")
    assert "1 of 2 cases cannot be packed" in refused(capsys, *flags, "--window", "bone")
    assert content(tmp_path / "store") == before
    folders(tmp_path / "in")
    assert main([*map(str, flags), "--workers", "1", "--window", "bone"]) == 0
    assert SliceStore(tmp_path / "store").index["window"] == [-500, 1300]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "store"]


def test_a_window_that_loses_the_scan_is_refused_with_one_that_fits(tmp_path: Path, capsys) -> None:
    image = np.random.default_rng(0).random((16, 16, 4)).astype(np.float32)
    for kind, array in (("images", image), ("labels", (image > 0.5).astype(np.uint8))):
        layouts.write(tmp_path / "in" / kind / "case1.nii", array)
    flags = ("folder", "--input", tmp_path / "in", "--output", tmp_path / "store")
    text = refused(capsys, *flags)
    assert "leaves 2 grey values" in text
    assert "pass --window percentile or --window 0.00" in text
    assert main([*map(str, flags), "--workers", "1", "--window", "percentile"]) == 0


def test_a_constant_scan_becomes_background(tmp_path: Path) -> None:
    folders(tmp_path / "in")
    nib.save(
        nib.Nifti1Image(np.full(layouts.SHAPE, 7, np.int16), layouts.AFFINE),
        tmp_path / "in" / "images" / "case1.nii",
    )
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "store")]
    assert main(["folder", *flags, "--workers", "1", "--window", "percentile"]) == 0
    assert not SliceStore(tmp_path / "store").read(0, 0)[0].any()


def test_a_mask_of_0_and_255_gets_the_same_advice_everywhere(tmp_path: Path, capsys) -> None:
    flags = folders(tmp_path / "in", label_scale=255)[1:]
    for source in ("folder", "volumes"):
        text = refused(capsys, source, *flags, "--output", tmp_path / source)
        assert "label ids 255 are outside 0 to 254; relabel 255 to 1" in text
    found = [finding.what for finding in verify(tmp_path / "in")[1]]
    assert "label ids 255 are outside 0 to 254; relabel 255 to 1" in found
    names = [f"organ{number}" for number in range(255)]
    text = refused(capsys, "folder", *flags, "--output", tmp_path / "many", "--classes", *names)
    assert "255 classes; at most 254" in text


def test_a_store_with_the_least_an_index_needs_describes_itself(tmp_path: Path) -> None:
    folder = layouts.slice_store(tmp_path / "store", train=4)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for name in set(index) - {"format", "classes", "cases"}:
        del index[name]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    info = build_dataset("store", "train", data_root=folder).info
    assert (info["window"], info["orientation"], info["clahe"]) == ("percentile", "LPS", False)
