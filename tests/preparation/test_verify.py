"""Verification: every planted fault is found, named by its file, and told from an oddity."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset.prepare.command import main as prepare
from dataset.scans.read import read_header
from dataset.verify.command import main, verify
from tests.helpers import layouts
from tests.helpers.planted import FAULTS, IMAGE, ODDITIES
from tests.stress.scans.dicom import series


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """One sound data set of every layout, and a store."""
    root = tmp_path_factory.mktemp("clean")
    layouts.word(root / "word", {"Tr": [1, 2, 3], "Val": [4], "Ts": [5]})
    layouts.nnunet(
        root / "nnunet",
        {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumour": 2}},
    )
    for name in ("images", "labels"):
        shutil.copytree(root / "nnunet" / f"{name}Tr", root / "folder" / name)
    layouts.care(
        root / "care", {"train": ["case1_slice0", "case1_slice1", "7"], "test": ["case2_slice0"]}
    )
    arguments = ["--input", str(root / "word"), "--output", str(root / "store"), "--folds", "3"]
    assert prepare(["word", *arguments, "--workers", "1"]) == 0
    return root


@pytest.mark.parametrize(
    ("layout", "count"), [("word", 5), ("nnunet", 2), ("folder", 2), ("care", 4), ("store", 5)]
)
def test_sound_data_pass(clean, layout, count, capsys):
    assert verify(clean / layout) == (layout, [], count)
    assert main([str(clean / layout), "--workers", "1"]) == 0
    assert "0 errors and 0 warnings" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(clean, tmp_path, name):
    layout, plant, file, text = FAULTS[name]
    root = tmp_path / layout
    shutil.copytree(clean / layout, root)
    plant(root)
    findings = [found for found in verify(root)[1] if found.level == "error"]
    found = [(finding.file, finding.what) for finding in findings]
    assert any(file in where and re.search(text, what) for where, what in found), found
    assert all("\n" not in what for _, what in found)
    assert main([str(root), "--workers", "1"]) == 1


@pytest.mark.parametrize("name", ODDITIES)
def test_a_warning_is_no_error(clean, tmp_path, name, capsys):
    plant, file, text = ODDITIES[name]
    shutil.copytree(clean / "word", tmp_path / "word")
    plant(tmp_path / "word")
    findings = verify(tmp_path / "word")[1]
    assert [finding.level for finding in findings] == ["warning"] * len(findings)
    assert any(finding.file == file and text in finding.what for finding in findings), findings


def test_json_lists_the_same(clean, tmp_path, capsys):
    shutil.copytree(clean / "word", tmp_path / "word")
    FAULTS["image with NaN"][1](tmp_path / "word")
    capsys.readouterr()
    assert main([str(tmp_path / "word"), "--json", "--workers", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "word"
    assert report["read"] == 5
    assert [row["file"] for row in report["errors"]] == [IMAGE]
    assert report["warnings"] == []


def test_what_cannot_be_checked_ends_with_two(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("verify: error: ") for line in lines)


def test_nothing_is_changed(clean):
    def state() -> dict[str, tuple[int, bytes]]:
        files = sorted(path for path in clean.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    for layout in ("word", "care", "store"):
        verify(clean / layout)
    assert state() == before


def test_real_scans_are_sound(shared_data):
    for folder in (shared_data / "word", shared_data / "care"):
        findings = verify(folder)[1]
        assert [finding for finding in findings if finding.level == "error"] == []


def test_arrays_of_another_run_are_found(clean, tmp_path):
    """Each file of a store made with another window, put by hand into the store."""
    arguments = ["--input", str(clean / "word"), "--output", str(tmp_path / "other")]
    assert prepare(["word", *arguments, "--workers", "1", "--window", "bone", "--seed", "2"]) == 0
    names = [f"cases/word_0001.{end}" for end in ("image.npy", "json")] + ["index.json"]
    for name in names:
        store = tmp_path / name.replace("/", "_")
        shutil.copytree(clean / "store", store)
        shutil.copy(tmp_path / "other" / name, store / name)
        found = [finding for finding in verify(store)[1] if finding.level == "error"]
        assert any(text in f.what for f in found for text in ("index", "record")), (name, found)


def test_a_window_that_does_not_suit_the_scans_is_a_warning(clean, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(clean / "store", store)
    index = json.loads((store / "index.json").read_text(encoding="utf-8"))
    first, second = sorted((store / "cases").glob("*.image.npy"))[:2]
    np.save(first, np.load(first) // 128)
    white = np.full_like(np.load(second), 255)
    white[0, 0, :20] = np.arange(20)
    np.save(second, white)
    for case in index["cases"]:
        del case["digests"]
    (store / "index.json").write_text(json.dumps(index), encoding="utf-8")
    found = [f.what for f in verify(store)[1] if f.level == "warning"]
    assert "only 2 grey values; does the window suit the scan?" in found
    assert any("of all pixels above black are white" in what for what in found), found


def test_a_series_of_a_study_folder_is_chosen(tmp_path, capsys):
    study, labels = tmp_path / "images" / "case", tmp_path / "labels"
    study.mkdir(parents=True)
    series(study, name="a{}.dcm".format)
    series(study, all_slices={"SeriesInstanceUID": "1.2.7", "SeriesNumber": 5}, count=3)
    header = read_header(study, series=1)
    mask = np.zeros(header.shape, np.uint8)
    mask[2:5, 2:5] = 1
    layouts.write(labels / "case.nii.gz", mask, header.affine)
    assert "choose one with --series" in verify(tmp_path)[1][0].what
    assert [found.level for found in verify(tmp_path, series=1)[1]] == ["warning"]  # values, no HU
    assert "does not lie on its image" in verify(tmp_path, series=2)[1][0].what
    assert main([str(tmp_path), "--series", "3", "--workers", "1"]) == 1
    assert "no series 3; it holds 2" in capsys.readouterr().out


def test_a_spacing_that_differs_from_the_affine_is_found(clean, tmp_path):
    shutil.copytree(clean / "store", tmp_path / "store")
    path = tmp_path / "store" / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["cases"][0]["spacing"] = [1.0, 1.0, 1.0]
    path.write_text(json.dumps(index), encoding="utf-8")
    assert any("spacing 1 1 1 mm, but its affine" in f.what for f in verify(path.parent)[1])


def test_choices_that_a_store_does_not_have_are_refused(clean, capsys):
    assert main([str(clean / "store"), "--series", "1"]) == 2
    assert "is read as store: leave out --series" in capsys.readouterr().err
