"""Every way of tuning, by the command line: it trains, resumes exactly, evaluates and predicts.

The encoder is the tiny one; what each way computes is tested in test_lora and test_sam_decoder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.command import TINY, assert_refused, assert_same_run, run
from tests.helpers.layouts import slice_store
from usam.cli.choices import ADAPTERS, TUNINGS
from usam.models import lora
from usam.models.usam import build_usam
from usam.weights.small_checkpoint import is_base

WAYS = list(product(ADAPTERS, TUNINGS))
SHORT = ("--batch_size", "4", "--val_fraction", "0.34", "--dataset", "store", "--prompt_mode", "2")
CPU = ("--device", "cpu", "--amp", "off", "--num_workers", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The flag that names a small store."""
    return "--data_root", str(slice_store(tmp_path_factory.mktemp("store"), train=4))


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all tensors that SAM has, of the tiny size, for images of 64 pixels."""
    torch.manual_seed(2)
    model = build_usam("vit_tiny", 4, 64, "none")
    state = {name.removeprefix("sam."): value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weight") / "sam_tiny.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CT of three slices."""
    path, rng = tmp_path_factory.mktemp("scan") / "scan.nii.gz", np.random.default_rng(1)
    nib.save(nib.Nifti1Image(rng.integers(-150, 200, (32, 32, 3)).astype(np.int16), None), path)
    return path


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> Iterator[None]:
    """A way's folders go after its test: with their optimizers' state they take a gigabyte."""
    yield
    shutil.rmtree(tmp_path)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.usefixtures("keep_the_first_epoch")
@pytest.mark.parametrize(("adapter", "tuning"), WAYS)
def test_a_way_trains_resumes_exactly_evaluates_and_predicts(
    adapter: str, tuning: str, data: tuple, scan: Path, tmp_path: Path, capsys: Any
) -> None:
    way, whole, again = ("--adapter", adapter, "--tuning", tuning), tmp_path / "a", tmp_path / "b"
    result = run(
        capsys, *TINY, *SHORT, *data, *way, "--epochs", "2", "--output_dir", whole
    )  # fmt: skip
    assert result.code == 0, result.err
    assert re.search(rf"--adapter {adapter} --tuning {tuning}: [\d.]+ M of [\d.]+ M", result.out)
    last = torch.load(whole / "last.pth", weights_only=True)
    assert (last["data"]["adapter"], last["data"]["tuning"]) == (adapter, tuning)

    # Resumed without its flags and with activations computed again: not a bit is different.
    shutil.copytree(tmp_path / "after-1", again)
    first = tensors(again / "last.pth")
    result = run(
        capsys, *CPU, *data, "--checkpoint_activations", "--output_dir", again,
        "--resume", again / "last.pth",
    )  # fmt: skip
    assert result.code == 0, result.err
    for folder in (whole, again):
        for name in ("last.pth", "best.pth"):
            state = torch.load(folder / name, weights_only=True)
            del state["args"]["checkpoint_activations"]
            torch.save(state, folder / name)
    assert_same_run(again, whole)
    moved = {name for name, value in first.items() if not torch.equal(value, last["model"][name])}
    moved = {name for name in moved if not name.endswith("tracked") and "running_" not in name}
    model = build_usam("vit_tiny", 3, 32, adapter, tuning)
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}

    result = run(
        capsys, *CPU, *data, "--dataset", "store", "--eval", "--resume", again / "best.pth",
        "--output_dir", tmp_path / "scores",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text(encoding="utf-8"))
    result = run(
        capsys, *CPU, "--predict", scan, "--resume", again / "best.pth", "--point", "9", "9", "1",
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert nib.load(tmp_path / "scan_seg.nii.gz").shape == (32, 32, 3)


@pytest.mark.parametrize(("adapter", "tuning"), WAYS)
def test_a_way_trains_in_bfloat16_with_activations_computed_again(
    adapter: str, tuning: str, data: tuple, tmp_path: Path, capsys: Any
) -> None:
    result = run(
        capsys, *TINY, *SHORT, *data, "--adapter", adapter, "--tuning", tuning, "--epochs", "1",
        "--amp", "bf16", "--checkpoint_activations", "--output_dir", tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "bfloat16" in result.out
    line = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8"))
    assert line["skipped_steps"] == 0
    assert 0 < line["loss"] < 5
    assert all(value.isfinite().all() for value in tensors(tmp_path / "last.pth").values())


@pytest.mark.usefixtures("keep_the_first_epoch")
@pytest.mark.parametrize(("adapter", "tuning"), [("u", "lora"), ("none", "decoder")])
def test_small_checkpoints_resume_exactly_with_sams_file_and_say_when_it_is_missing(
    adapter: str, tuning: str, data: tuple, sam: Path, tmp_path: Path, capsys: Any
) -> None:
    way = ("--adapter", adapter, "--tuning", tuning, "--sam_weight", sam)
    runs = {"whole": (), "small": ("--small_checkpoints",)}
    for name, flag in runs.items():
        folder = tmp_path / name / "run"
        result = run(
            capsys, *TINY, *SHORT, *data, *way, *flag, "--epochs", "2", "--output_dir", folder
        )  # fmt: skip
        assert result.code == 0, result.err
    whole, small = (tensors(tmp_path / name / "run" / "last.pth") for name in runs)
    assert small.keys() == {name for name in whole if not is_base(name)}
    assert all(torch.equal(value, whole[name]) for name, value in small.items())

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "small" / "after-1", again)
    result = run(capsys, *CPU, *data, "--output_dir", again, "--resume", again / "last.pth")
    assert result.code == 0, result.err
    assert_same_run(again, tmp_path / "small" / "run")

    scored = []
    for name in runs:
        result = run(
            capsys, *CPU, *data, "--dataset", "store", "--eval", "--output_dir", tmp_path / name,
            "--resume", tmp_path / name / "run" / "best.pth",
        )  # fmt: skip
        assert result.code == 0, result.err
        scored.append(json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8")))
        del scored[-1]["checkpoint"]
    assert scored[0] == scored[1]

    hidden = sam.rename(sam.with_name("hidden.pth"))
    try:
        evaluation = (*CPU, *data, "--dataset", "store", "--eval", "--resume", again / "best.pth")
        result = run(capsys, *evaluation, "--output_dir", tmp_path)
        assert_refused(result, again / "best.pth", "needs sam_tiny.pth", "--sam_weight")
        result = run(capsys, *evaluation, "--output_dir", tmp_path, "--sam_weight", hidden)
        assert result.code == 0, result.err
    finally:
        hidden.rename(sam)


def test_lora_is_exported_and_starts_another_run(data: tuple, tmp_path: Path, capsys: Any) -> None:
    way = (*TINY, *SHORT, *data, "--tuning", "lora", "--adapter", "none", "--epochs", "1")
    result = run(capsys, *way, "--output_dir", tmp_path / "first", "--ema", "0.5")
    assert result.code == 0, result.err
    exported = tmp_path / "new" / "lora.safetensors"
    best = tmp_path / "first" / "best.pth"
    result = run(capsys, *CPU, "--resume", best, "--export_lora", exported)
    assert result.code == 0, result.err
    named = load_file(exported)
    wanted = lora.to_samed(tensors(best))
    assert {f"w_{part}_{number:03d}" for part in "ab" for number in range(8)} == wanted.keys()
    assert all(torch.equal(named[name], value) for name, value in wanted.items())
    before = exported.read_bytes()
    result = run(capsys, *CPU, "--resume", best, "--export_lora", exported)
    assert_refused(result, "lora.safetensors exists", "--overwrite")
    exported.write_bytes(b"notes")
    result = run(capsys, *CPU, "--resume", best, "--export_lora", exported, "--overwrite")
    assert (result.code, exported.read_bytes()) == (0, before)
    link, whole = tmp_path / "link.pth", best.read_bytes()
    link.symlink_to(best)
    for target in (best, link):
        result = run(capsys, *CPU, "--resume", best, "--export_lora", target, "--overwrite")
        assert_refused(result, "is the checkpoint itself")
    assert best.read_bytes() == whole
    result = run(
        capsys, *way, "--output_dir", tmp_path / "second", "--lora_weight", exported, "--lr", "0",
        "--lr_vit", "0",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "LoRA of 4 blocks loaded" in result.out
    start = tensors(tmp_path / "second" / "last.pth")  # nothing has moved at a rate of 0
    assert all(torch.equal(value, wanted[n]) for n, value in lora.to_samed(start).items())


def test_flags_that_a_way_has_no_use_for_are_refused(
    data: tuple, sam: Path, tmp_path: Path, capsys: Any
) -> None:
    way = (*TINY, *SHORT, *data, "--epochs", "1", "--output_dir", tmp_path / "run")
    result = run(capsys, *way, "--small_checkpoints", "--tuning", "lora")
    assert_refused(result, "--small_checkpoints", "SAM's file")
    result = run(capsys, *way, "--small_checkpoints", "--sam_weight", sam)
    assert_refused(result, "--small_checkpoints", "--tuning lora or decoder")
    assert_refused(run(capsys, *way, "--lora_weight", tmp_path / "no.pth"), "no weight file")
    result = run(capsys, *way, "--tuning", "lora", "--lora_weight", "no.pth", "--resume", "auto")
    assert_refused(result, "no weight file")
    for rest in ((), ("--resume", "auto")):
        result = run(capsys, *way, "--export_lora", tmp_path / "a.pth", *rest)
        assert_refused(result, "--export_lora needs", "--resume")
    result = run(capsys, *way, "--model", "sam-med3d", "--tuning", "lora")
    assert_refused(result, "is not for --model sam-med3d")
    assert run(capsys, *way, "--tuning", "decoder").code == 0
    last = tmp_path / "run" / "last.pth"
    result = run(capsys, *CPU, *data, "--resume", last, "--tuning", "lora")
    assert_refused(result, "--tuning lora", "was trained with decoder")
    result = run(capsys, *CPU, *data, "--resume", last, "--adapter", "none", "--eval")
    assert_refused(result, "--adapter none", "was trained with u")
    result = run(capsys, *CPU, "--resume", last, "--export_lora", tmp_path / "lora.pth")
    assert_refused(result, "holds no LoRA")
    result = run(capsys, *way, "--init", last, "--adapter", "none")
    assert_refused(result, last, "--adapter u")
