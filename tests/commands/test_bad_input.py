"""What u-sam.py says to bad flags, data and checkpoints: one line, and exit code 2.

That of the readers alone is in the tests of their rooms.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import layouts
from tests.helpers.command import (
    AGAIN,
    SCRIPT,
    TINY,
    TRAINED,
    assert_refused,
    launch,
    run,
)
from tests.helpers.layouts import slice_store
from usam.training import checkpoint


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--img_size", "100"], ["--img_size 100", "multiple of 16"]),
        (["--img_size", "0"], ["--img_size", "'0' is not a whole number from 16"]),
        (["--eval"], ["--eval needs --resume"]),
        (["--dataset", "rectal"], ["--dataset", "rectal", "rectum", "phantom"]),
        (["--prompt_mode", "4"], ["--prompt_mode", "4"]),
        (["--lr", "nan"], ["--lr", "'nan' is not a finite number"]),
        (["--lr_vit", "-1"], ["--lr_vit", "-1"]),
        (["--epochs", "0"], ["--epochs", "'0' is not a whole number from 1"]),
        (["--batch_size", "two"], ["--batch_size", "two"]),
        (["--seed", "-3"], ["--seed", "-3"]),
        (["--val_fraction", "1"], ["--val_fraction", "below 1"]),
        (["--val_fraction", "0", "--fold", "0"], ["--val_fraction and --fold", "validation cases"]),
        (["--sam_model", "vit_x"], ["--sam_model", "vit_x", "vit_b"]),
        (["--amp", "fp8"], ["--amp", "fp8", "bf16"]),
        (["--device", "gpu"], ["--device gpu", "cuda"]),
        (["--world_size", "2"], ["--world_size 2", "torchrun"]),
        (["--no_such_flag"], ["--no_such_flag: no such flag"]),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    arguments: list[str], wanted: list[str], capsys: Any
) -> None:
    assert_refused(run(capsys, *arguments), *wanted)


def test_cuda_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(run(capsys, "--device", "cuda"), "--device cuda", "--device cpu")


def test_missing_data_names_the_folder_the_layout_and_the_phantom(
    tmp_path: Path, capsys: Any
) -> None:
    missing = tmp_path / "nowhere"
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", missing)
    assert_refused(result, missing, "train/train_npz/NAME.npz", "--dataset phantom")
    result = run(capsys, *TINY, "--dataset", "store", "--data_root", missing)
    assert_refused(result, missing, "index.json")
    assert_refused(run(capsys, *TINY, "--dataset", "store"), "--data_root")


def test_a_real_process_leaves_with_code_2_and_one_line(tmp_path: Path) -> None:
    result = launch(sys.executable, SCRIPT, *TINY, "--data_root", tmp_path / "nowhere")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.fixture
def care(tmp_path: Path) -> Iterator[Path]:
    """A CARE release to spoil; its test split is fine."""
    names = [f"case1_slice{k}" for k in range(2)]
    yield layouts.care(tmp_path / "care", {"train": names, "test": ["case2_slice0"]})


def spoil(care: Path, **arrays: Any) -> Path:
    path = care / "train" / "train_npz" / "case1_slice1.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("key", ["image", "label"])
def test_an_npz_without_image_or_label_is_named(care: Path, key: str, capsys: Any) -> None:
    other = {"image": "label", "label": "image"}[key]
    path = spoil(care, **{other: np.zeros((32, 32))})
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", care)
    assert_refused(result, path, f"no array '{key}'")


def test_labels_out_of_range_are_named(care: Path, capsys: Any) -> None:
    path = spoil(care, image=np.zeros((32, 32)), label=np.full((32, 32), 7.0))
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", care)
    assert_refused(result, path, "label ids 7")


def test_a_csv_that_names_a_missing_file_is_named(care: Path, capsys: Any) -> None:
    table = care / "train" / "train_bbox.csv"
    table.write_text(table.read_text(encoding="utf-8") + 'case9_slice9,"[1, 2, 3, 4]"\n')
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", care)
    assert_refused(result, table, "case9_slice9")


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_fault_found_while_loading_is_one_line(
    tmp_path: Path, num_workers: str, capsys: Any
) -> None:
    root = slice_store(tmp_path / "store")
    for path in sorted((root / "cases").glob("train*.mask.npy")):
        np.save(path, np.full((3, 32, 32), 9, np.uint8))
    result = run(
        capsys, *TRAINED, "--data_root", root, "--output_dir", tmp_path / "run",
        "--num_workers", num_workers,
    )  # fmt: skip
    assert_refused(result, "label ids 9 are outside the class table, 0 to 2")


def test_checkpoints_that_are_missing_or_something_else_are_named(
    tmp_path: Path, store: Path, capsys: Any
) -> None:
    missing, broken, other = (tmp_path / name for name in ("none.pth", "cut.pth", "other.pth"))
    broken.write_bytes(b"PK\x03\x04 cut short")
    checkpoint.save(other, {"format": 1})
    flags = (*AGAIN, "--data_root", store, "--output_dir", tmp_path / "run")
    assert_refused(run(capsys, *flags, "--resume", missing), f"no checkpoint at {missing}")
    assert_refused(run(capsys, *flags, "--eval", "--resume", missing), missing)
    assert_refused(run(capsys, *flags, "--resume", broken), broken, "damaged")
    assert_refused(run(capsys, *flags, "--resume", other), other)
    weights = tmp_path / "sam.pth"
    result = run(capsys, *flags, "--sam_weight", weights)
    assert_refused(result, f"no SAM checkpoint at {weights}")
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_is_a_file_is_named(store: Path, tmp_path: Path, capsys: Any) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    assert_refused(run(capsys, *TRAINED, "--data_root", store, "--output_dir", taken), taken)
