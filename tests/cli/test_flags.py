"""The rows of flags: published names and defaults, what each does, and that each is read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import dataset
from dataset.store.slices import SliceStore, write_case, write_index
from tests.conftest import ROOT
from usam.cli import choices, page
from usam.cli.flags import DEFAULTS, FLAGS
from usam.cli.parser import fill_defaults, help_text, parse_flags
from usam.training.usam import load_split

PUBLISHED_FLAGS = {
    "--prompt_mode", "--warmup", "--lr", "--lr_vit", "--lr_backbone", "--batch_size",
    "--weight_decay", "--epochs", "--clip_max_norm", "--img_size", "--dataset", "--output_dir",
    "--device", "--seed", "--resume", "--start_epoch", "--eval", "--num_workers", "--world_size",
    "--dist_url", "--data_root", "--model", "--sam_model", "--sam_weight", "--amp",
}  # fmt: skip


def test_flags_keep_their_published_names() -> None:
    assert {f"--{name}" for name in vars(parse_flags([]))} >= PUBLISHED_FLAGS


@pytest.mark.parametrize(
    "command",
    [
        "--epochs 100 --batch_size 24 --dataset rectum",
        "--num_workers 4 --epochs 100 --batch_size 24 --dataset rectum",
        "--dataset rectum --eval --resume chkpt/best.pth",
    ],
)
def test_published_commands_parse(command: str) -> None:
    assert parse_flags(shlex.split(command)).dataset == "rectum"


def test_every_flag_is_read() -> None:
    readers = [ROOT / "u-sam.py", *(ROOT / "usam").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in readers)
    unread = [name for name in vars(parse_flags([])) if not re.search(rf"args\.{name}\b", text)]
    assert not unread


def test_every_flag_is_one_row_with_a_full_phrase() -> None:
    names = [flag.name for flag in FLAGS]
    assert len(names) == len(set(names))
    for flag in FLAGS:
        assert len(flag.help.split()) >= 2, flag.name
        assert not flag.help.endswith("."), flag.name
        assert flag.resume in ("", "kept", "decisive", "model"), flag.name
        assert flag.model in ("", *choices.MODELS), flag.name
        if flag.choices and flag.default is not None:
            assert {flag.default_of(m) for m in choices.MODELS} <= set(flag.choices), flag.name


def test_help_names_the_default_of_both_models_where_they_differ() -> None:
    helps = {flag.name: help_text(flag) for flag in FLAGS}
    assert helps["lr"].endswith("(default: 0.001; sam-med3d: 8e-05)")
    assert helps["seed"] == "random seed (default: 202307)"
    assert helps["rounds"].startswith("(sam-med3d only) clicks simulated")
    assert helps["tta"].startswith("(u-sam only, --eval and --predict) ")


def test_data_sets_are_those_of_the_dataset_package() -> None:
    assert tuple(dataset.DATASETS) == choices.DATASETS
    assert tuple(dataset.VOLUMES) == choices.VOLUMES


def test_the_page_of_flags_is_up_to_date() -> None:
    found = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert found == page.flags_page(), "run: python -m usam.cli > docs/flags.md"


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
    args = parse_flags(given + (["--empty", value] if value else []))
    fill_defaults(args, None)
    store = SliceStore(tmp_path)
    assert len(load_split(args, "train", store, {})) == number
    assert len(load_split(args, "test", store, {})) == 3


@pytest.mark.parametrize("given", [["--empty", "drop"], ["--init", "chkpt/best.pth"]])
def test_flags_of_the_other_model_are_refused(given: list[str]) -> None:
    args = parse_flags(["--model", "sam-med3d", *given])
    with pytest.raises(ValueError, match=f"{given[0]} is not for --model sam-med3d"):
        fill_defaults(args, None)


def test_every_model_has_its_defaults() -> None:
    assert tuple(DEFAULTS) == choices.MODELS


def test_defaults_are_the_published_ones() -> None:
    args = parse_flags([])
    fill_defaults(args, None)
    expected = {
        "epochs": 100, "batch_size": 24, "num_workers": 2, "img_size": 224, "seed": 202307,
        "lr": 1e-3, "lr_vit": 1e-4, "lr_backbone": 1e-4, "weight_decay": 1e-4, "prompt_mode": 0,
        "clip_max_norm": 0, "accumulation_steps": 1, "val_fraction": 0.1, "dataset": "rectum",
        "sam_model": "vit_b", "model": "u-sam", "output_dir": Path("chkpt"), "amp": "auto",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_removed_flag_of_the_other_model_is_none_and_no_obstacle() -> None:
    saved = {"args": {"model": "sam-med3d", "focal_gamma": None, "patience": 0}, "data": {}}
    args = parse_flags(["--resume", "last.pth"])
    fill_defaults(args, saved)
    assert args.model == "sam-med3d"


def test_a_checkpoint_trained_with_a_removed_flag_is_refused_by_name(capsys) -> None:
    saved = {"args": {"model": "u-sam", "focal_gamma": 0.0, "patience": 0, "lr": 0.5}, "data": {}}
    args = parse_flags(["--resume", "last.pth"])
    fill_defaults(args, saved)
    assert args.lr == 0.5
    for name, value in (("focal_gamma", 2.0), ("patience", 9)):
        other = {"args": saved["args"] | {name: value}, "data": {}}
        with pytest.raises(ValueError, match=f"trained with --{name} {value}, which was removed"):
            fill_defaults(parse_flags(["--resume", "last.pth"]), other)
        fill_defaults(parse_flags(["--resume", "last.pth", "--override"]), other)
        assert f"--{name} {value}" in capsys.readouterr().out
        fill_defaults(parse_flags(["--resume", "last.pth", "--eval"]), other)
