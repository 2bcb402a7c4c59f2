"""The Dataset of volumes: cubes around objects, draws by seed, splits by patient, sound stores."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import build_dataset, build_volumes, open_volumes
from dataset.crops import box_origin, crop_at
from dataset.scans.volumes import read_volume
from dataset.store.slices import SliceStore
from dataset.store.volumes import VolumeStore, write_volume, write_volume_index
from tests.helpers.volume_layouts import blob, layout, prepared, save_as, scan


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> VolumeStore:
    """Six patients of two organs and a test patient."""
    tmp_path = tmp_path_factory.mktemp("store")
    for seed in range(6):
        scan(tmp_path / "in", f"case_{seed}", seed=seed)
    scan(tmp_path / "in", "case_9", seed=9, labels="labelsTs")
    return prepared(tmp_path / "in", tmp_path / "out", "--classes", "liver", "kidney")


def same(first: dict, second: dict) -> bool:
    return first["id"] == second["id"] and all(
        torch.equal(first[key], second[key]) for key in ("image", "mask")
    )


def test_items_are_cubes_with_one_object(store: VolumeStore) -> None:
    dataset = build_volumes("volumes", "test", store=store, side=32)
    assert [dataset[index]["id"] for index in range(2)] == ["case_9:liver", "case_9:kidney"]
    for index, number in enumerate((1, 2)):
        item = dataset[index]
        image, mask = store.read(6)
        origin = box_origin(*store.cases[6]["boxes"][str(number)], 32)
        assert item["image"].dtype == torch.int16
        assert item["mask"].dtype == torch.uint8
        np.testing.assert_array_equal(item["image"][0].numpy(), crop_at(image, origin, 32))
        np.testing.assert_array_equal(item["mask"].numpy(), crop_at(mask, origin, 32) == number)
        assert item["mask"].sum() == store.voxels(6, number)
        assert same(item, dataset[index])


def test_training_draws_by_seed_epoch_and_index_alone(store: VolumeStore) -> None:
    dataset = build_volumes("volumes", "train", store=store, side=32)
    again = pickle.loads(pickle.dumps(dataset))
    drawn = [[dataset[index, epoch] for index in range(len(dataset))] for epoch in range(4)]
    for epoch in (3, 0):
        for index in reversed(range(len(dataset))):
            assert same(drawn[epoch][index], again[index, epoch])
    items = [item for row in drawn for item in row]
    assert {item["id"].split(":")[1] for item in items} == {"liver", "kidney"}
    assert not any(same(*pair) for pair in zip(drawn[0], drawn[1], strict=True))
    assert all(item["mask"].any() for item in items)
    other = build_volumes("volumes", "train", store=store, side=32, seed=1)
    assert not all(same(other[i, 0], drawn[0][i]) for i in range(len(dataset)))


def test_training_shows_objects_anywhere_in_the_cube(store: VolumeStore) -> None:
    dataset = build_volumes("volumes", "train", store=store, side=32)
    items = [dataset[index, epoch] for index in range(len(dataset)) for epoch in range(8)]
    middles = np.array([np.argwhere(item["mask"].numpy()).mean(axis=0) for item in items])
    assert (middles.min(axis=0) < 8).all()
    assert (middles.max(axis=0) > 24).all()
    assert np.abs(middles.mean(axis=0) - 15.5).max() < 2.5  # no side is preferred


def test_the_object_is_in_its_cube_however_small_that_is(store: VolumeStore) -> None:
    dataset = build_volumes("volumes", "train", store=store, side=8)  # smaller than the organs
    assert all(dataset[i]["mask"].any() for i in range(len(dataset)))
    assert all(dataset[i, e]["mask"].any() for i in range(len(dataset)) for e in range(6))


def test_a_hollow_object_is_in_its_cube(tmp_path: Path) -> None:
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[2:38, 2:38, 2:38] = 1
    mask[5:35, 5:35, 5:35] = 0
    entry = {"id": "shell", "split": "train", "file": "shell", "affine": np.eye(4).tolist()}
    case = write_volume(tmp_path, entry, mask.astype(np.int16), mask)
    write_volume_index(tmp_path, {"classes": TABLE, "cases": [case]})
    dataset = build_volumes("volumes", "train", data_root=tmp_path, side=16)
    assert dataset[0]["mask"].any()
    assert all(dataset[0, epoch]["mask"].any() for epoch in range(20))


def test_flips_can_be_left_out(store: VolumeStore) -> None:
    plain = build_volumes("volumes", "train", store=store, side=32, flips=False)
    flipped = build_volumes("volumes", "train", store=store, side=32)
    turned = [
        axes
        for index in range(8)
        for axes in [(), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]
        if torch.equal(plain[index, 0]["image"].flip(axes), flipped[index, 0]["image"])
    ]
    assert len(turned) == 8
    assert len(set(turned)) > 2


def test_a_volume_smaller_than_the_cube_is_padded(store: VolumeStore) -> None:
    item = build_volumes("volumes", "train", store=store, side=128)[0, 1]
    assert item["image"].shape == (1, 128, 128, 128)
    assert item["mask"].any()
    x, y, z = store.cases[0]["shape"]
    assert np.count_nonzero(item["image"]) <= x * y * z < 128**3


def test_training_and_prediction_cut_the_same_cube(tmp_path: Path) -> None:
    """From a scan in any orientation, the stored case and the scan read for prediction agree."""
    drawn, wanted = blob((40, 50, 16), (1.1, 0.9, 2.7)), None
    for codes in ("RAS", "LPS", "SPL"):
        folder = tmp_path / codes
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True)
        for kind, path in zip(("images", "labels"), save_as(tmp_path, codes, *drawn), strict=True):
            path.rename(folder / kind / "one.nii.gz")
        store = prepared(folder, tmp_path / f"{codes}_out")
        dataset = build_volumes("volumes", "train", store=store, side=24)
        items = [dataset[0], dataset[1], dataset[0, 0], dataset[1, 5]]
        wanted = wanted or items
        assert all(same(*pair) for pair in zip(items, wanted, strict=True))
        scan_volume = read_volume(folder / "images" / "one.nii.gz")
        origin = box_origin(*store.cases[0]["boxes"]["1"], 24)
        np.testing.assert_array_equal(
            crop_at(scan_volume.image, origin, 24), items[0]["image"][0].numpy()
        )
        np.testing.assert_allclose(scan_volume.affine, store.cases[0]["affine"])


def test_no_patient_is_on_both_sides(tmp_path: Path) -> None:
    layout(tmp_path / "in", number=10)
    store = prepared(tmp_path / "in", tmp_path / "out", "--test_fraction", "0.2")
    sides = [
        {
            store.cases[n]["patient"]
            for n in build_volumes("volumes", split, store=store, val_fraction=0.25).case_numbers
        }
        for split in ("train", "val", "test")
    ]
    assert [len(side) for side in sides] == [6, 2, 2]
    assert len(set.union(*sides)) == 10


def test_validation_follows_the_fraction(store: VolumeStore) -> None:
    sizes = {
        fraction: len(build_volumes("volumes", "val", store=store, side=16, val_fraction=fraction))
        for fraction in (0.01, 0.34, 0)
    }
    assert sizes == {0.01: 0, 0.34: 4, 0: 2}


def test_an_unknown_class_or_split_is_refused(store: VolumeStore) -> None:
    with pytest.raises(ValueError, match="class 'heart' is not in .* it holds liver, kidney"):
        build_volumes("volumes", "train", store=store, only=["heart"])
    with pytest.raises(ValueError, match="split 'training'"):
        build_volumes("volumes", "training", store=store)
    kidneys = build_volumes("volumes", "train", store=store, only=["kidney"], side=16)
    assert {kidneys[i, 3]["id"].split(":")[1] for i in range(len(kidneys))} == {"kidney"}
    with pytest.raises(ValueError, match="holds no volumes"):
        open_volumes("word", store.folder)


TABLE = [{"id": 0, "name": "background"}, {"id": 1, "name": "thing"}]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"file": "../up"}, "not a plain file name"),
        ({"shape": [8, 8]}, "shape"),
        ({"dtype": "object"}, "dtype"),
        ({"objects": [2]}, "object 2 is not"),
        ({"objects": [True]}, "object True"),
        ({"boxes": {"1": [[0, 0, 0], [9, 8, 8]]}}, "no box inside"),
        ({"pixels": {"1": [0, 0, 0]}}, "no voxel counts"),
        ({"pixels": {"1": [1, 10**30, 1]}}, "no voxel counts"),
        ({"pixels": {"1": [9] * 8}}, "no voxel counts"),
        ({"pixels": [1, 2]}, "tables of boxes"),
    ],
)
def test_hostile_indexes_are_refused(tmp_path: Path, change: dict, text: str) -> None:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    entry = {"id": "a", "split": "train", "file": "a"}
    case = write_volume(tmp_path, entry, mask.astype(np.int16), mask)
    path = write_volume_index(tmp_path, {"classes": TABLE, "cases": [case]})
    index = json.loads(path.read_text(encoding="utf-8"))
    index["cases"][0].update(change)
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=text):
        VolumeStore(tmp_path)


def test_other_arrays_than_the_index_names_are_refused(tmp_path: Path) -> None:
    mask = np.ones((8, 8, 8), np.uint8)
    case = write_volume(
        tmp_path, {"id": "a", "split": "train", "file": "a"}, mask.astype(np.int16), mask
    )
    write_volume_index(tmp_path, {"classes": TABLE, "cases": [case]})
    np.save(tmp_path / "cases" / "a.image.npy", np.ones((8, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"expected int16 \(8, 8, 8\), found float32"):
        VolumeStore(tmp_path).read(0)


def test_slices_and_volumes_are_told_apart(store: VolumeStore) -> None:
    with pytest.raises(ValueError, match="a store of volumes; train on it with --model sam-med3d"):
        SliceStore(store.folder)
    with pytest.raises(ValueError, match="is not one of"):
        build_dataset("volumes", "train", data_root=store.folder)
