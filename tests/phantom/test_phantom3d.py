"""Drawn volumes: the same for a seed, patients apart, organs there, touching and alike."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset import build_volumes, open_volumes
from dataset.phantom.belly import CLASSES, GUT, SIZE, affine, build, draw_case

RECIPE = {"train_cases": 3, "val_cases": 1, "test_cases": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("volumes") / "phantom3d", **RECIPE)


def test_the_same_seed_draws_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", **RECIPE)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            assert (again / path.relative_to(root)).read_bytes() == path.read_bytes(), path
    image, mask = draw_case("train", 1)
    stored = open_volumes("phantom3d", root).read(open_number(root, "phantom3d_train_0001"))
    np.testing.assert_array_equal(stored[0], image)
    np.testing.assert_array_equal(stored[1], mask)


def open_number(root: Path, name: str) -> int:
    return [case["id"] for case in open_volumes("phantom3d", root).cases].index(name)


def test_patients_differ_between_splits_and_seeds() -> None:
    first = draw_case("train", 0)[1]
    for other in (draw_case("val", 0), draw_case("train", 1), draw_case("train", 0, seed=1)):
        assert (other[1] != first).mean() > 0.02


def test_every_organ_is_there_and_large_enough(root: Path) -> None:
    store = open_volumes("phantom3d", root)
    assert store.classes == [row["name"] for row in CLASSES]
    for number, case in enumerate(store.cases):
        assert case["shape"] == [SIZE] * 3
        for organ in range(1, len(CLASSES)):
            assert store.voxels(number, organ) * 1.5**3 / 1000 > 1, (case["id"], organ)
    assert {case["split"] for case in store.cases} == {"train", "val", "test"}


def test_values_are_those_of_a_ct(root: Path) -> None:
    image, mask = open_volumes("phantom3d", root).read(0)
    assert image.dtype == np.int16
    assert abs(np.median(image[:3, :3]) + 1000) < 5  # air
    assert all(20 < image[mask == organ].mean() < 230 for organ in range(1, len(CLASSES)))
    assert image[mask > 0].std() < 90


def test_only_clicks_tell_the_loops_of_gut_apart() -> None:
    owners = set()
    for number in range(3):
        image, mask = draw_case("train", number)
        means = [image[mask == organ].mean() for organ in GUT]
        assert max(means) - min(means) < 40
        places = [np.argwhere(mask == organ).mean(axis=0) for organ in GUT]
        owners.add(int(np.argmax([place[0] for place in places])))
        touching = sum(
            int(((mask == organ) & np.isin(np.roll(mask, 1, axis), GUT) & (mask != 0)
                 & (np.roll(mask, 1, axis) != organ)).sum())
            for organ in GUT for axis in range(3)
        )  # fmt: skip
        assert touching > 150
    assert len(owners) > 1


def test_the_frame_is_ras_about_the_middle() -> None:
    matrix = affine()
    assert nib.aff2axcodes(matrix) == ("R", "A", "S")
    np.testing.assert_allclose(matrix @ [47.5, 47.5, 47.5, 1], [0, 0, 0, 1], atol=1e-9)


def test_items_fit_the_small_model(root: Path) -> None:
    sets = [build_volumes("phantom3d", split, data_root=root, side=64)
            for split in ("train", "val", "test")]  # fmt: skip
    assert [len(dataset) for dataset in sets] == [24, 8, 16]
    assert not set(sets[0].case_ids) & set(sets[1].case_ids + sets[2].case_ids)
    item = sets[0][3, 1]
    assert item["image"].shape == (1, 64, 64, 64)
    assert item["mask"].any()
    assert sets[2].info["classes"][1] == "liver"
    json.dumps(sets[2].info)


def test_it_is_drawn_once_and_again_for_another_recipe(root: Path) -> None:
    before = (root / "index.json").stat().st_mtime_ns
    open_volumes("phantom3d", root)
    open_volumes("phantom3d", root, seed=202307)
    assert (root / "index.json").stat().st_mtime_ns == before


def test_another_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="holds other files"):
        open_volumes("phantom3d", tmp_path)
    with pytest.raises(ValueError, match="at least one case"):
        build(tmp_path / "none", train_cases=0, val_cases=0, test_cases=0)
