"""2.5D input: a slice between its neighbours, the same in training, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset import build_dataset
from dataset.scans.slices import ScanSlices
from dataset.slices import CLIP_LIMITS, SliceDataset, equalize, neighbours
from dataset.store.slices import SliceStore, write_case, write_index
from tests.helpers.command import TINY, run
from usam.cli.choices import MIXED
from usam.prediction.prompts import ScanPrompts
from usam.prediction.slice_prompts import slice_prompts

SIDE, NUM_SLICES = 128, 5
LISTED = [True, False, True, True, False]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    """Cases of five random slices, not all of them listed; CLAHE is asked for."""
    folder, rng, cases = tmp_path_factory.mktemp("store"), np.random.default_rng(0), []
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        name = f"{split}{number}"
        image = rng.integers(100, 140, (NUM_SLICES, SIDE, SIDE)).astype(np.uint8)
        entry = {"id": name, "split": split, "file": name, "listed": LISTED}
        entry["slices"] = [f"{name}_{k}" for k in range(NUM_SLICES)]
        cases.append(write_case(folder, entry, image, (image > 120).astype(np.uint8)))
    classes = [{"id": i, "name": n, "color": "#000000"} for i, n in enumerate("ab")]
    write_index(folder, {
        "classes": classes, "orientation": "LPS", "window": [-160, 240], "clahe": True,
        "cases": cases,
    })  # fmt: skip
    return SliceStore(folder)


def both(store: SliceStore) -> tuple[SliceDataset, SliceDataset]:
    """The training slices as 2D and as 2.5D."""
    flat, deep = (
        build_dataset("store", "train", store=store, img_size=48, val_fraction=0, input_mode=mode)
        for mode in ("2d", "2.5d")
    )
    return flat, deep


def test_the_ends_of_a_case_stand_in_for_the_neighbour_they_lack() -> None:
    assert [neighbours(k, 3) for k in range(3)] == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]
    assert neighbours(0, 1) == [0, 0, 0]


def test_neighbours_are_the_cases_own_whether_listed_or_not(store: SliceStore) -> None:
    flat, deep = both(store)
    assert flat.slices == deep.slices == [(n, k) for n in (1, 2) for k in (0, 2, 3)]
    for index, (number, k) in enumerate(deep.slices):
        item = deep[index]
        assert item["image"].shape == (3, 48, 48)
        assert torch.equal(item["image"][1], flat[index]["image"][0])
        assert torch.equal(item["mask"], flat[index]["mask"])
        whole = SliceDataset(store, [(number, j) for j in range(NUM_SLICES)], img_size=48)
        for channel, j in zip(item["image"], neighbours(k, NUM_SLICES), strict=True):
            assert torch.equal(channel, whole[j]["image"][0])


def test_a_training_draw_gives_all_three_the_same_contrast(store: SliceStore) -> None:
    deep = SliceDataset(store, [(1, 2)], img_size=SIDE, seed=7, input_mode="2.5d")
    limit = float(np.random.default_rng((7, 4, 0)).uniform(*CLIP_LIMITS))
    wanted = [equalize(store.read(1, k)[0], limit) for k in (1, 2, 3)]
    assert np.array_equal(deep[0, 4]["image"].numpy(), np.stack(wanted))
    assert len({deep[0, epoch]["image"].numpy().tobytes() for epoch in range(6)}) > 1


def scan_of(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / "scan.nii.gz"
    array = rng.integers(-160, 240, (SIDE, SIDE, NUM_SLICES)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 5.0, 1.0])), path)
    return path


@pytest.mark.parametrize("clahe", [False, True])
def test_prediction_shows_a_slice_as_training_did(tmp_path: Path, clahe: bool) -> None:
    path = scan_of(tmp_path, np.random.default_rng(1))
    data = {
        "window": [-160, 240], "orientation": "LPS", "img_size": 48, "clahe": clahe, "crop": 0.0,
    }  # fmt: skip
    deep, flat = ScanSlices(path, data | {"input": "2.5d"}), ScanSlices(path, data)
    for k in range(NUM_SLICES):
        wanted = [flat.model_input(j)[0] for j in neighbours(k, NUM_SLICES)]
        assert np.array_equal(deep.model_input(k), np.stack(wanted))
    assert flat.model_input(0).shape == (1, 48, 48)


def test_a_checkpoint_of_2_5d_evaluates_and_predicts_so(
    store: SliceStore, tmp_path: Path, capsys: Any
) -> None:
    common = [*TINY[4:], "--output_dir", tmp_path]
    given = ["--dataset", "store", "--data_root", store.folder]
    result = run(capsys, *TINY, *given, "--output_dir", tmp_path, "--epochs", "1", "--batch_size",
                 "3", "--val_fraction", "0", "--input", "2.5d")  # fmt: skip
    assert result.code == 0, result.err
    assert "2.5d input" in result.out
    best = tmp_path / "best.pth"
    assert torch.load(best, weights_only=True)["data"]["input"] == "2.5d"
    seen = []

    def note(module: torch.nn.Module, given: tuple, output: Any) -> None:
        seen.append(given[0].shape[1])

    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, output: (
            note(module, given, output) if type(module).__name__ == "USam" else None
        )
    ):
        result = run(capsys, *common, *given, "--eval", "--resume", best)
        assert result.code == 0, result.err
        scan = scan_of(tmp_path, np.random.default_rng(1))
        result = run(capsys, *common, "--predict", scan, "--resume", best)
        assert result.code == 0, result.err
    assert set(seen) == {3}
    assert (tmp_path / "scan_seg.nii.gz").exists()


def test_a_model_of_mixed_prompts_takes_what_prompts_there_are(tmp_path: Path) -> None:
    data = {"window": [-160, 240], "orientation": "LPS", "img_size": SIDE}
    scan = ScanSlices(scan_of(tmp_path, np.random.default_rng(1)), data)
    point, box = (20.0, 30.0, 2.0, 1), (2, 10.0, 12.0, 40.0, 50.0)
    assert slice_prompts(ScanPrompts(), MIXED, scan) is None
    for given, mode in (
        (ScanPrompts(boxes=(box,)), 1),
        (ScanPrompts(points=(point,)), 2),
        (ScanPrompts(points=(point,), boxes=(box,)), 3),
    ):
        found = slice_prompts(given, MIXED, scan)
        assert found.mode == mode
        batch = found.batch(found.slices, num_classes=2)
        assert (batch["boxes"] is not None) == (mode in (1, 3))
        assert (batch["points"] is not None) == (mode in (2, 3))
