"""One training per output folder, its last lines, and the cases its checkpoint records."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.files import locked
from dataset.store.slices import SliceStore
from tests.helpers.command import TRAINED, assert_refused, run
from usam.cli.parser import parse_flags

ONCE = (*TRAINED, "--epochs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("locked") / "run"


def test_a_second_training_in_one_folder_is_refused(folder: Path, store: Path, capsys: Any) -> None:
    flags = (*ONCE, "--data_root", store, "--output_dir", folder)
    with locked(folder, "training"):
        assert_refused(run(capsys, *flags), folder, "in use", f"process {os.getpid()} ")
    assert not (folder / "log.jsonl").exists()
    result = run(capsys, *flags)
    assert result.code == 0, result.err
    lines = result.out.strip().splitlines()
    assert any(line.startswith("best epoch: 0 with a validation Dice of ") for line in lines)
    command = next(line for line in reversed(lines) if "python u-sam.py" in line)
    args = parse_flags(shlex.split(command.partition("u-sam.py ")[2]))
    assert args.eval and args.dataset == "store"
    assert Path(args.output_dir) == folder


def test_a_checkpoint_records_its_cases_by_content(folder: Path, store: Path) -> None:
    saved = torch.load(folder / "best.pth", weights_only=True)
    cases = saved["data"]["cases"]
    opened = SliceStore(store)
    digests = opened.case_digests(range(len(opened.cases)))
    used = {*cases["trained_on"].values(), *cases["chosen_by"].values()}
    train = {case["id"] for case in opened.cases if case["split"] == "train"}
    assert used == {digests[name] for name in train}
    assert not {*cases["trained_on"].values()} & {*cases["chosen_by"].values()}
    assert sorted(saved["data"]["held_out"]) == sorted(cases["chosen_by"])
