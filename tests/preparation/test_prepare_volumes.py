"""`dataset.prepare volumes`: layouts found, packed at 1.5 mm, structures and faults listed."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset import build_volumes, open_volumes
from dataset.prepare.command import main
from dataset.scans.volumes import read_volume
from tests.helpers.volume_layouts import layout, prepared, scan


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["volumes", *map(str, arguments), "--workers", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    return "\n".join(line for line in lines if "case/s" not in line and "s/case" not in line)


def test_the_published_layout_is_packed_on_first_use(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = layout(tmp_path / "data")
    store = open_volumes("volumes", root)
    assert store.folder == root / "packed"
    assert store.classes == ["background", "kidney", "liver"]
    assert len(store.cases) == 8
    image, mask = store.read(0)
    assert store.cases[0]["id"] == "kidney/ct_demo/case0"
    assert set(np.unique(mask)) == {0, 1}
    assert set(np.unique(store.read(7)[1])) == {0, 2}
    np.testing.assert_array_equal(
        image, read_volume(root / "kidney/ct_demo/imagesTr/case0.nii.gz").image
    )
    capsys.readouterr()
    assert open_volumes("volumes", root).digest == store.digest
    assert "preparing" not in capsys.readouterr().err
    scan(root / "liver" / "ct_demo", "case9", seed=9, binary=1)
    assert len(open_volumes("volumes", root).cases) == 9


def test_several_roots_mix(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    roots = [layout(tmp_path / "a", ["liver"], 2), layout(tmp_path / "b", ["spleen", "aorta"], 2)]
    scan(tmp_path / "b" / "aorta" / "ct_demo", "case7", labels="labelsTs", binary=1)
    store = open_volumes("volumes", roots)
    assert store.classes == ["background", "aorta", "liver", "spleen"]
    assert [case["split"] for case in store.cases].count("test") == 1
    test = build_volumes("volumes", "test", store=store, side=16)
    assert test.case_ids == ["aorta/ct_demo/case7"]
    assert (tmp_path / "cache" / "u-sam").is_dir()


def test_labels_that_are_not_binary_are_refused(tmp_path: Path, capsys) -> None:
    layout(tmp_path / "in", number=1)
    scan(tmp_path / "in" / "liver" / "ct_demo", "many")
    text = refused(capsys, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert "1 of 3 cases cannot be packed" in text
    assert "many.nii.gz" in text
    assert "has binary labels; use images and labels folders: label ids 2 are" in text
    assert not (tmp_path / "out" / "index.json").exists()


def test_nnunet_tables_and_plain_pairs(tmp_path: Path) -> None:
    tables = {
        "v1": {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}},
        "v2": {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}},
    }
    for version, table in tables.items():
        scan(tmp_path / version, "case_001")
        (tmp_path / version / "imagesTr" / "case_001.nii.gz").rename(
            tmp_path / version / "imagesTr" / "case_001_0000.nii.gz"
        )
        (tmp_path / version / "dataset.json").write_text(json.dumps(table), encoding="utf-8")
        store = prepared(tmp_path / version, tmp_path / f"{version}_out")
        assert store.classes == ["background", "a", "b"]
        assert store.cases[0]["objects"] == [1, 2]
    pairs = tmp_path / "pairs"
    scan(pairs, "one", labels="labels")
    store = prepared(pairs, tmp_path / "pairs_out", "--classes", "left", "right")
    assert store.classes == ["background", "left", "right"]
    assert prepared(pairs, tmp_path / "unnamed").classes[1:] == ["class 1", "class 2"]


def test_word_and_amos_names(tmp_path: Path) -> None:
    scan(tmp_path / "word", "word_0001")
    scan(tmp_path / "amos", "amos_0013", labels="labelsVa")
    assert prepared(tmp_path / "word", tmp_path / "w").classes[1] == "liver"
    store = prepared(tmp_path / "amos", tmp_path / "a")
    assert store.classes[1] == "spleen"
    assert len(store.classes) == 16
    assert store.cases[0]["split"] == "val"


def test_real_volumes_keep_every_class(tmp_path: Path, shared_data: Path) -> None:
    store = prepared(shared_data / "word", tmp_path / "out")
    for case, wanted in zip(store.cases, (14, 6), strict=True):
        assert len(case["objects"]) + len(case["dropped"]) == wanted
    objects = build_volumes("volumes", "test", store=store)
    item = objects[0]
    assert item["id"] == "word_9002:liver"
    assert item["mask"].sum() == 209178  # as published inference counts them
    amos = nib.load(shared_data / "amos_label" / "labelsVa" / "amos_0013.nii.gz")
    folder = tmp_path / "amos"
    for kind in ("imagesVa", "labelsVa"):
        (folder / kind).mkdir(parents=True)
    small = amos.slicer[100:356, 100:356, 20:60]
    nib.save(small, folder / "labelsVa" / "amos_0013.nii.gz")
    values = (np.asarray(small.dataobj) * 10).astype(np.int16)
    nib.save(nib.Nifti1Image(values, small.affine), folder / "imagesVa" / "amos_0013.nii.gz")
    store = prepared(folder, tmp_path / "amos_out")
    image, mask = store.read(0)
    assert len(store.cases[0]["objects"]) >= 8
    inside = mask == store.classes.index("liver")
    assert np.median(image[inside]) == 60  # image and label were turned alike


def test_small_structures_are_dropped_counted_and_listed(tmp_path: Path, capsys) -> None:
    image, label, affine = scan(tmp_path / "in", "one", labels="labels")
    label[20, 20, 1:3] = 3
    label[0, 0, 0] = 4
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "in" / "labels" / "one.nii.gz")
    store = prepared(tmp_path / "in", tmp_path / "out")
    assert store.cases[0]["objects"] == [1, 2]
    assert (store.read(0)[1] == 3).any()  # still in the mask
    printed = capsys.readouterr().out
    assert "no objects, 2:" in printed
    assert "one: class 3: 0.0072 cm3, below 1" in printed
    assert build_volumes("volumes", "train", store=store, side=16).skipped == store.dropped
    store = prepared(tmp_path / "in", tmp_path / "all", "--min_volume", "0")
    assert store.cases[0]["objects"] == [1, 2, 3, 4]


def test_a_label_empty_after_resampling_is_listed(tmp_path: Path, capsys) -> None:
    label = np.zeros((40, 40, 40), np.uint8)
    label[5:30, 5:30, 11] = 2  # 0.4 mm thin, between the voxels of 1.5 mm
    label[10:30, 10:30, 20:30] = 1
    affine = np.diag([0.4, 0.4, 0.4, 1.0])
    for kind, array in (("images", label.astype(np.int16)), ("labels", label)):
        (tmp_path / "in" / kind).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, affine), tmp_path / "in" / kind / "a.nii")
    store = prepared(tmp_path / "in", tmp_path / "out", "--min_volume", "0")
    assert store.cases[0]["objects"] == [1]
    assert store.dropped == ["a: class 2: no voxel left at 1.5 mm"]
    assert "no voxel left at 1.5 mm" in capsys.readouterr().out
    dataset = build_volumes("volumes", "train", store=store, side=16)
    assert len(dataset) == 1
    assert all(dataset[0, epoch]["mask"].any() for epoch in range(5))


def test_empty_data_sets_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "none").mkdir()
    for root, text in (
        (tmp_path / "none", "no scans in"),
        (tmp_path / "nowhere", "no folder"),
    ):
        assert text in refused(capsys, "--input", root, "--output", tmp_path / "out")
    (tmp_path / "hollow" / "liver" / "ct_x" / "imagesTr").mkdir(parents=True)
    assert "no labelled scan" in refused(
        capsys, "--input", tmp_path / "hollow", "--output", tmp_path / "out"
    )
    image, label, affine = scan(tmp_path / "blank", "a", labels="labels")
    nib.save(nib.Nifti1Image(label * 0, affine), tmp_path / "blank" / "labels" / "a.nii.gz")
    text = refused(capsys, "--input", tmp_path / "blank", "--output", tmp_path / "out")
    assert "no structure of 1 cm3 or more in 1 case;" in text
    with pytest.raises(FileNotFoundError, match="no store of volumes in"):
        build_volumes("volumes", "train", data_root=tmp_path / "none")
    with pytest.raises(ValueError, match="--data_root must name"):
        build_volumes("volumes", "train")


def test_flags_that_do_nothing_are_refused(tmp_path: Path, capsys) -> None:
    for arguments, text in (
        (["volumes", "--clahe"], "volumes: leave out --clahe"),
        (["word", "--min_volume", "2"], "--min_volume is for the source volumes"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--input", str(tmp_path), "--output", str(tmp_path / "o")])
        assert text in capsys.readouterr().err
    scan(tmp_path / "a", "word_0001")
    inputs = ["--input", tmp_path / "a", tmp_path / "a", "--output", tmp_path / "o"]
    assert "several --input must be ROOT/CLASS" in refused(capsys, *inputs)


def test_float_and_integer_scans_mix(tmp_path: Path) -> None:
    image, label, affine = scan(tmp_path / "in", "a", labels="labels")
    scan(tmp_path / "in", "b", labels="labels")
    path = tmp_path / "in" / "images" / "b.nii.gz"
    nib.save(nib.Nifti1Image(image / np.float32(7), affine), path)
    store = prepared(tmp_path / "in", tmp_path / "out")
    assert [case["dtype"] for case in store.cases] == ["int16", "float32"]
    dataset = build_volumes("volumes", "train", store=store, side=16)
    assert {dataset[i]["image"].dtype for i in range(len(dataset))} == {torch.float32}


def test_preparation_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    layout(tmp_path / "in", number=2)
    store = prepared(tmp_path / "in", tmp_path / "out")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cases").glob("*.npy")}
    (tmp_path / "out" / "index.json").unlink()
    (tmp_path / "out" / "cases" / "kidney_ct_demo_case0.mask.npy").unlink()
    again = prepared(tmp_path / "in", tmp_path / "out")
    assert again.digest == store.digest
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cases").glob("*.npy")}
    assert sum(kept[name] != times[name] for name in times) == 2
