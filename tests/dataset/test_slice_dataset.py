"""The Dataset over a slice store: items, draws that are always the same, splits by case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset import DATASETS, build_dataset
from dataset.slices import SliceDataset, equalize, resize_mask
from dataset.store.slices import SliceStore, write_case, write_index
from tests.dataset.test_slices import index_of, make_store


def test_an_item_is_uint8_and_the_same_every_time(tmp_path: Path) -> None:
    dataset = build_dataset("store", "train", data_root=make_store(tmp_path), val_fraction=0)
    item = dataset[2]
    assert item["id"] == "c0_2"
    assert item["image"].shape == (1, 224, 224)
    assert item["image"].dtype == item["mask"].dtype == torch.uint8
    assert item["mask"].shape == (224, 224)
    assert torch.equal(item["image"], dataset[2]["image"])
    assert dataset.classes == ["background", "a", "b"]
    assert dataset.info["window"] == [-160, 240]
    assert dataset.info["img_size"] == 224


def test_an_item_at_the_stored_size_is_the_equalized_slice(tmp_path: Path) -> None:
    store = SliceStore(make_store(tmp_path))
    item = SliceDataset(store, store.slices("train"), img_size=32)[0]
    image, mask = store.read(0, 0)
    np.testing.assert_array_equal(item["image"][0].numpy(), equalize(np.array(image), 2.0))
    np.testing.assert_array_equal(item["mask"].numpy(), mask)
    assert item["mask"].numpy().flags.writeable


def test_a_store_without_clahe_keeps_its_intensities(tmp_path: Path) -> None:
    store = SliceStore(make_store(tmp_path))
    store.index["clahe"] = False
    item = SliceDataset(store, store.slices("train"), img_size=32)[0]
    np.testing.assert_array_equal(item["image"][0].numpy(), store.read(0, 0)[0])


def test_a_resized_mask_stays_centred() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 1
    for size in (3, 16, 20):
        small = resize_mask(mask, size)
        np.testing.assert_array_equal(small, small[::-1, ::-1])


def test_training_draws_differ_by_epoch_and_not_by_workers(tmp_path: Path) -> None:
    root = make_store(tmp_path, side=128)  # clip limits only tell on tiles of some size
    dataset = build_dataset("store", "train", data_root=root, val_fraction=0)
    assert not torch.equal(dataset[0, 0]["image"], dataset[0, 1]["image"])
    keys = [(index, 3) for index in range(len(dataset))]
    batches = [
        list(DataLoader(dataset, batch_size=4, sampler=keys, num_workers=workers))
        for workers in (0, 2)
    ]
    for alone, shared in zip(*batches, strict=True):
        assert alone["id"] == shared["id"]
        assert torch.equal(alone["image"], shared["image"])
        assert torch.equal(alone["mask"], shared["mask"])


def test_workers_may_be_spawned(tmp_path: Path) -> None:
    dataset = build_dataset("store", "train", data_root=make_store(tmp_path), val_fraction=0)
    dataset[0]
    loader = DataLoader(dataset, batch_size=18, num_workers=1, multiprocessing_context="spawn")
    assert next(iter(loader))["image"].shape == (18, 1, 224, 224)


def test_validation_holds_out_whole_cases_by_seed(tmp_path: Path) -> None:
    store = SliceStore(make_store(tmp_path, cases=20))
    train, val = (build_dataset("store", name, store=store).slices for name in ("train", "val"))
    train_cases, val_cases = {n for n, _ in train}, {n for n, _ in val}
    assert len(val_cases) == 2
    assert len(val) == 6
    assert train_cases | val_cases == set(range(20))
    assert not train_cases & val_cases
    assert val == build_dataset("store", "val", store=store).slices
    others = {
        tuple(build_dataset("store", "val", store=store, seed=seed).slices) for seed in range(5)
    }
    assert len(others) > 1


@pytest.mark.parametrize(("cases", "fraction"), [(2, 0.5), (4, 0.1), (6, 0.05)])
def test_too_few_cases_leave_validation_empty(tmp_path: Path, cases: int, fraction: float) -> None:
    root = make_store(tmp_path, cases=cases)
    assert len(build_dataset("store", "val", data_root=root, val_fraction=fraction)) == 0
    assert len(build_dataset("store", "train", data_root=root, val_fraction=fraction)) == 3 * cases


def test_a_fraction_of_zero_validates_on_the_test_split(tmp_path: Path) -> None:
    root = make_store(tmp_path, split="test")
    val = build_dataset("store", "val", data_root=root, val_fraction=0)
    assert val.slices == build_dataset("store", "test", data_root=root).slices
    assert val.case_ids == [f"c{i}" for i in range(6)]


def test_validation_cases_of_the_store_are_kept(tmp_path: Path) -> None:
    store = SliceStore(make_store(tmp_path, cases=10))
    store.cases[7]["split"] = "val"
    val, train = (
        build_dataset("store", split, store=store, val_fraction=0.5) for split in ("val", "train")
    )
    assert val.slices == store.slices("val")
    assert len(train) == 27


def test_a_split_without_slices_is_an_error(tmp_path: Path) -> None:
    root = make_store(tmp_path)
    with pytest.raises(FileNotFoundError, match="no test slices in"):
        build_dataset("store", "test", data_root=root)
    with pytest.raises(FileNotFoundError, match="no test slices in"):
        build_dataset("store", "val", data_root=root, val_fraction=0)
    with pytest.raises(ValueError, match="split 'dev'"):
        build_dataset("store", "dev", data_root=root)
    with pytest.raises(ValueError, match="val_fraction"):
        build_dataset("store", "val", data_root=root, val_fraction=1.5)


def test_unknown_data_sets_and_missing_roots_are_named() -> None:
    with pytest.raises(ValueError, match="'liver' is not one of rectum, word, phantom, store"):
        build_dataset("liver", "train")
    with pytest.raises(ValueError, match="--data_root"):
        build_dataset("store", "train")
    assert set(DATASETS) >= {"rectum", "word", "phantom", "store"}


def test_empty_training_slices_are_thinned_out_to_a_share(tmp_path: Path) -> None:
    mask = np.zeros((10, 16, 16), np.uint8)
    mask[:4, 3, 3] = 1
    entry = {"id": "a", "split": "train", "file": "a", "slices": [f"a{k}" for k in range(10)]}
    write_index(tmp_path, index_of([write_case(tmp_path, entry, np.zeros_like(mask), mask)]))

    def chosen(empty: float | None) -> list[int]:
        data = build_dataset("store", "train", data_root=tmp_path, empty=empty, val_fraction=0)
        return [k for _, k in data.slices]

    assert chosen(None) == chosen(1.0) == list(range(10))
    assert chosen(0.0) == [0, 1, 2, 3]
    half = chosen(0.5)
    assert half[:4] == [0, 1, 2, 3]
    assert len(half) == 8
    assert half == chosen(0.5)
