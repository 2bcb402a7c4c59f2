"""WORD from a slice store: 17 classes, the rim cut off, slices with organs in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataset import build_dataset, word
from dataset.slices import resize_mask
from dataset.store.slices import write_case, write_index


def make_word_store(folder: Path, *, num_classes: int = 17, side: int = 512) -> Path:
    """A store of two training cases and a test case, every second slice empty."""
    names = ["background", *word.ORGANS][:num_classes]
    entries = []
    for number, split in enumerate(["train", "train", "test"]):
        image = np.full((4, side, side), 10 + number, np.uint8)
        image[:, 60, 60] = 200
        mask = np.zeros((4, side, side), np.uint8)
        mask[::2, side // 4 : side // 2, side // 4 : side // 2] = 1 + number
        file = f"word_{number:04d}"
        ids = [f"{file}_{k}" for k in range(4)]
        entry = {"id": file, "split": split, "file": file, "slices": ids, "spacing": [2.5, 1, 1]}
        entries.append(write_case(folder, entry, image, mask))
    index = {
        "dataset": "word",
        "classes": [{"id": i, "name": n, "color": "#000000"} for i, n in enumerate(names)],
        "window": [-160, 240],
        "orientation": "LPS",
        "clahe": False,
        "source": "0",
        "cases": entries,
    }
    write_index(folder, index)
    return folder


def test_training_draws_from_slices_with_an_organ_and_testing_from_all(tmp_path: Path) -> None:
    root = make_word_store(tmp_path)
    train = build_dataset("word", "train", data_root=root)
    test = build_dataset("word", "test", data_root=root)
    assert len(train.classes) == 17
    assert train.classes[13] == "rectum"
    assert train.slices == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert test.slices == [(2, 0), (2, 1), (2, 2), (2, 3)]


def test_sixty_pixels_are_cut_from_each_side(tmp_path: Path) -> None:
    dataset = build_dataset("word", "train", data_root=make_word_store(tmp_path), img_size=392)
    item = dataset[0]
    assert item["image"].shape == (1, 392, 392)
    assert item["image"][0, 0, 0] == 200  # stored at (60, 60)
    stored = dataset.store.read(0, 0)[1]
    np.testing.assert_array_equal(item["mask"].numpy(), stored[60:-60, 60:-60])
    assert dataset.info["crop"] == 60 / 512
    smaller = build_dataset("word", "train", store=dataset.store, img_size=224)[0]["mask"].numpy()
    np.testing.assert_array_equal(smaller, resize_mask(np.array(stored[60:-60, 60:-60]), 224))


def test_a_missing_store_and_another_class_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="word: no slice store in .*dataset.prepare word"):
        build_dataset("word", "train", data_root=tmp_path / "nothing")
    root = make_word_store(tmp_path, num_classes=5, side=64)
    with pytest.raises(ValueError, match="holds 5 classes, WORD has 17"):
        build_dataset("word", "train", data_root=root)
    assert len(build_dataset("store", "train", data_root=root)) == 8
