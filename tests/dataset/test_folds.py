"""Folds of a prepared store: who trains, who validates, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataset import build_dataset
from dataset.files import write_json
from dataset.splits import read_fold, split_table
from dataset.store.slices import SliceStore, write_case, write_index
from usam.training.manifest import differences


@pytest.fixture
def store(tmp_path: Path) -> Path:
    cases, splits = [], []
    mask = np.ones((2, 8, 8), np.uint8)
    for number in range(8):
        split = "test" if number == 7 else "val" if number == 6 else "train"
        name = f"case{number}"
        entry = {
            "id": name,
            "split": split,
            "file": name,
            "slices": [f"{name}_{k}" for k in (0, 1)],
        }
        cases.append(write_case(tmp_path, entry, mask * 9, mask))
        splits.append((name, split))
    classes = [{"id": 0, "name": "rest"}, {"id": 1, "name": "organ"}]
    write_index(tmp_path, {"classes": classes, "orientation": "LPS", "cases": cases})
    write_json(tmp_path / "splits.json", split_table(splits, folds=3, seed=1))
    return tmp_path


def cases_of(store: Path, split: str, fold: int | None) -> list[str]:
    return build_dataset("store", split, data_root=store, img_size=16, fold=fold).case_ids


def test_every_training_case_validates_in_one_fold_and_trains_in_the_others(store: Path) -> None:
    everyone = [f"case{number}" for number in range(6)]
    validated = []
    for fold in range(3):
        train, val = (cases_of(store, split, fold) for split in ("train", "val"))
        assert sorted(train + val) == everyone
        assert len(val) == 2
        validated += val
        assert cases_of(store, "test", fold) == ["case7"]
    assert sorted(validated) == everyone
    assert cases_of(store, "val", None) == ["case6"]  # the store's own, as ever


def test_folds_that_are_not_there_are_told_in_one_line(store: Path) -> None:
    with pytest.raises(ValueError, match=r"--fold 3: .*splits.json has folds 0 to 2"):
        cases_of(store, "train", 3)
    write_json(store / "splits.json", {"train": [], "val": [], "test": [], "folds": []})
    with pytest.raises(ValueError, match="no folds; prepare it with --folds N"):
        read_fold(store, 0)
    (store / "splits.json").write_text('{"folds": [{"train": 3}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="no splits as dataset.prepare writes them"):
        read_fold(store, 0)
    (store / "splits.json").unlink()
    with pytest.raises(FileNotFoundError, match="prepare the store with --folds N"):
        cases_of(store, "val", 0)


def test_folds_of_other_cases_than_the_stores_are_refused(store: Path) -> None:
    table = json.loads((store / "splits.json").read_text(encoding="utf-8"))
    table["folds"][0]["val"].append("case99")
    (store / "splits.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ValueError, match="case99 of splits.json is not among the training cases"):
        build_dataset("store", "val", store=SliceStore(store), fold=0)


def test_a_fold_is_known_by_its_cases(store: Path) -> None:
    def info(split: str, fold: int | None) -> dict:
        return build_dataset("store", split, data_root=store, img_size=16, fold=fold).info

    before = info("train", 0)
    assert before["fold_digest"] == info("val", 0)["fold_digest"] != info("val", 1)["fold_digest"]
    assert info("train", None)["fold_digest"] is None
    splits = [(f"case{number}", "train") for number in range(6)]
    write_json(store / "splits.json", split_table(splits, folds=3, seed=2))
    after = info("train", 0)
    assert after["digest"] == before["digest"]
    assert after["fold_digest"] != before["fold_digest"]
    run = {"arguments": {}, "samples_per_step": 1}
    found, _ = differences({**run, "data": before}, {**run, "data": after}, ())
    assert len(found) == 1
    assert found[0].startswith("the data's fold_digest")


def test_the_release_without_folds_names_the_way_to_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prepare care --input .* --folds 5.*--data_root X"):
        build_dataset("rectum", "train", data_root=tmp_path, fold=2)
