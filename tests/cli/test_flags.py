"""The flags of u-sam.py: published names and defaults, what each does, and that each is read.

Whole runs on flags that do not fit are in test_bad_input.py.
"""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest

from dataset import DATASETS
from dataset.store.slices import write_case, write_index
from tests.conftest import ROOT
from tests.helpers.command import (
    SCRIPT,
)
from usam.cli import flag_groups, flags

PUBLISHED_FLAGS = {
    "--prompt_mode", "--warmup", "--lr", "--lr_vit", "--lr_backbone", "--batch_size",
    "--weight_decay", "--epochs", "--clip_max_norm", "--img_size", "--dataset", "--output_dir",
    "--device", "--seed", "--resume", "--start_epoch", "--eval", "--num_workers", "--world_size",
    "--dist_url", "--data_root", "--model", "--sam_model", "--sam_weight", "--amp",
}  # fmt: skip


def test_flags_keep_their_published_names() -> None:
    assert {f"--{name}" for name in vars(flags.parse_flags(DATASETS, []))} >= PUBLISHED_FLAGS


@pytest.mark.parametrize(
    "command",
    [
        "--epochs 100 --batch_size 24 --dataset rectum",
        "--num_workers 4 --epochs 100 --batch_size 24 --dataset rectum",
        "--dataset rectum --eval --resume chkpt/best.pth",
    ],
)
def test_published_commands_parse(command: str) -> None:
    assert flags.parse_flags(DATASETS, shlex.split(command)).dataset == "rectum"


def test_every_flag_is_read() -> None:
    readers = [ROOT / "u-sam.py", *(ROOT / "usam").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in readers)
    unread = [
        name
        for name in vars(flags.parse_flags(DATASETS, []))
        if not re.search(rf"args\.{name}\b", text)
    ]
    assert not unread


@pytest.mark.parametrize(("value", "number"), [(None, 12), ("keep", 12), ("drop", 4), ("50%", 8)])
def test_empty_limits_training_slices_without_foreground(
    tmp_path: Path, value: str | None, number: int
) -> None:
    cases, mask = [], np.zeros((3, 32, 32), np.uint8)
    mask[1, 8:16, 8:16] = 1
    for split, count in (("train", 4), ("test", 1)):
        for name in (f"{split}{i}" for i in range(count)):
            entry = {
                "id": name,
                "split": split,
                "file": name,
                "slices": [f"{name}_{k}" for k in range(3)],
            }
            cases.append(write_case(tmp_path, entry, mask * 200, mask))
    classes = [{"id": i, "name": n, "color": "#000000"} for i, n in enumerate("ab")]
    write_index(tmp_path, {"classes": classes, "orientation": "LPS", "cases": cases})
    given = ["--dataset", "store", "--data_root", str(tmp_path), "--val_fraction", "0"]
    args = flags.parse_flags(DATASETS, given + (["--empty", value] if value else []))
    flags.settle(args, None)
    load_split = runpy.run_path(SCRIPT, run_name="u_sam")["load_split"]
    assert len(load_split(args, "train")) == number
    assert len(load_split(args, "test")) == 3


@pytest.mark.parametrize("given", [["--empty", "drop"], ["--init", "chkpt/best.pth"]])
def test_flags_of_the_other_model_are_refused(given: list[str]) -> None:
    args = flags.parse_flags([*DATASETS, "phantom3d"], ["--model", "sam-med3d", *given])
    with pytest.raises(ValueError, match=f"{given[0]} is not for --model sam-med3d"):
        flags.settle(args, None)


def test_every_model_has_its_defaults() -> None:
    assert tuple(flags.DEFAULTS) == flag_groups.MODELS


def test_defaults_are_the_published_ones() -> None:
    args = flags.parse_flags(DATASETS, [])
    flags.settle(args, None)
    wanted = {
        "epochs": 100, "batch_size": 24, "num_workers": 2, "img_size": 224, "seed": 202307,
        "lr": 1e-3, "lr_vit": 1e-4, "lr_backbone": 1e-4, "weight_decay": 1e-4, "prompt_mode": 0,
        "clip_max_norm": 0, "accumulation_steps": 1, "val_fraction": 0.1, "dataset": "rectum",
        "sam_model": "vit_b", "model": "u-sam", "output_dir": Path("chkpt"), "amp": "auto",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
