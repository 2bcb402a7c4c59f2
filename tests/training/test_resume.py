"""Going on from a checkpoint: which one, whether it fits this run, and what stays in the folder."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.helpers.command import (
    AGAIN,
    SCRIPT,
    TRAINED,
    assert_refused,
    assert_same_run,
    run,
)
from tests.helpers.layouts import slice_store
from tests.training.test_checkpoint import disk_full, state, value_of
from usam.cli import flags, parser
from usam.training import checkpoint, manifest, resume
from usam.training.checkpoint import CheckpointWriter, backup, backups


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs, each saved, with two predecessors of each file kept."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    words = [*TRAINED, "--data_root", store, "--output_dir", folder, "--keep", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "is_due", property(lambda self: True))
        patch.setattr(sys, "argv", ["u-sam.py", *map(str, words)])
        runpy.run_path(SCRIPT, run_name="__main__")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to go on in."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def epoch_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["progress"]["epoch"]


# ------------------------------------------------------------------------------------ auto


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file: of a weight, which torch reads without complaint."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lambda path: path.write_bytes(b"")])
def test_auto_names_what_is_damaged_and_takes_the_predecessor(
    trained: Path, copy: Path, store: Path, capsys: Any, monkeypatch: Any,
    damage: Callable[[Path], None],
) -> None:  # fmt: skip
    flags = [*TRAINED, "--data_root", store, "--output_dir", copy, "--resume", "auto"]
    damage(copy / "last.pth")
    read = Mock(side_effect=resume.read_checkpoint)
    monkeypatch.setattr(resume, "read_checkpoint", read)
    result = run(capsys, *flags)
    assert result.code == 0, result.err
    assert [call.args[0].name for call in read.call_args_list] == ["last.pth", "last.1.pth"]
    assert f"warning: {copy / 'last.pth'} is damaged" in result.out
    assert f"--resume auto: resuming from {copy / 'last.1.pth'}" in result.out
    assert (copy / "last.pth.damaged").exists()
    assert [epoch_of(path) for path in (copy / "last.pth", copy / "last.1.pth")] == [3, 2]
    assert_same_run(copy, trained)


def test_auto_does_not_start_over_where_all_are_damaged(
    copy: Path, store: Path, capsys: Any
) -> None:
    for path in copy.glob("last*.pth"):
        cut(path)
    before = sorted(path.name for path in copy.iterdir())
    flags = [*TRAINED, "--data_root", store, "--output_dir", copy, "--resume", "auto"]
    assert_refused(run(capsys, *flags), "--resume auto", copy, "damaged")
    assert sorted(path.name for path in copy.iterdir()) == before


def test_auto_starts_where_nothing_is_and_says_so(store: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "run"
    flags = [*TRAINED, "--data_root", store, "--output_dir", folder, "--resume", "auto"]
    result = run(capsys, *flags, "--epochs", "1")
    assert result.code == 0, result.err
    assert f"no checkpoint in {folder}, starting a new run" in result.out
    assert epoch_of(folder / "last.pth") == 1


@pytest.mark.parametrize("given", [["--sam_weight", "a.pth"], ["--init", "best.pth"]])
def test_weights_to_start_from_are_refused_beside_a_checkpoint(
    trained: Path, given: Any, capsys: Any
) -> None:
    result = run(capsys, *AGAIN, "--resume", trained / "last.pth", *given)
    assert_refused(result, given[0], "--resume")
    assert_refused(run(capsys, "--eval", "--resume", "auto"), "auto", "best.pth")


# --------------------------------------------------------------------------- what changed


CHANGED = {  # for each argument kept in a checkpoint: another value, and what becomes of it
    "error": {
        "dataset": "phantom", "val_fraction": 0.5, "empty": 0.5, "prompt_mode": 1,
        "accumulation_steps": 1, "lr": 0.5, "lr_vit": 0.5, "lr_backbone": 0.5,
        "weight_decay": 0.5, "warmup": False, "clip_max_norm": 7.0, "seed": 1, "ema": 0.5,
        "prompt_jitter": "9", "augment": "strong", "class_weights": "balanced",
        "foreground_share": 0.5, "sam_model": "vit_b", "img_size": 64,
        "input": "2.5d", "model": "sam-med3d", "adapter": "none", "tuning": "lora", "fold": 1,
    },
    "said": {
        "epochs": 5, "batch_size": 2, "num_workers": 3, "device": "cuda",
        "amp": "bf16", "compile": "on",
    },
    "free": {  # where things lie, how they are saved, and what only other runs read
        "data_root": "elsewhere", "output_dir": "elsewhere", "resume": "auto", "override": True,
        "patience": 9, "budget": 9.0,
        "save_every": 7, "keep": 5, "start_epoch": 1, "dist_url": "tcp://a:1", "world_size": 4,
        "checkpoint_activations": True, "recipe": "strong", "sam_weight": "a.pth",
        "init": "a.pth", "eval": True, "predict": "a.nii", "window": "b", "channel": 1,
        "box": "b", "slice": "b", "point": "b", "mm": True, "prompts": "b", "init_mask": "b",
        "probabilities": True, "overlay": True, "largest_component": True,
        "small_checkpoints": True, "lora_weight": "a", "export_lora": "a", "export_weights": "a",
        "spacing": "a",
        "merge": "a", "ensemble": "a", "tta": "a", "prompt_sweep": True, "tensorboard": True,
        "clicks": "largest", "classes": "a", "no_flips": True, "rel_pos": "published", "rounds": 3,
        "sam_preprocess": "minmax", "overwrite": True, "series": 1, "lps": True,
        "names": "nnunet", "serve": 1, "annotate": "a", "serve_key": "a", "max_sessions": 2,
        "orientation": "RAS", "cache_embeddings": "a", "cache_size": 3.0,
    },
}  # fmt: skip


def given(name: str, arguments: dict[str, Any]) -> list[str]:
    """The flag called `name` on a command line, as `arguments` has it."""
    value = arguments[name]
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def settled(saved: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The flags of a run that goes on from `saved`, given these words; errors as u-sam.py's."""
    args = parser.parse_flags(words)
    parser.fill_defaults(args, saved)
    return vars(args)


def test_every_argument_of_a_checkpoint_is_compared_or_free(trained: Path) -> None:
    saved = torch.load(trained / "last.pth", weights_only=True)
    known = {name for names in CHANGED.values() for name in names}
    assert saved["args"].keys() <= known
    words = [word for name in flags.DEFAULTS["u-sam"] for word in given(name, saved["args"])]
    words += ["--device", "cpu", "--amp", "off", "--num_workers", "0", "--resume", "last.pth"]
    decisive = flags.DEFAULTS["u-sam"].keys() & flags.DECISIVE
    for kind, names in CHANGED.items():
        for name in saved["args"].keys() & names:
            value = names[name]
            changed = saved | {"args": saved["args"] | {name: value}}
            changed["data"] = saved["data"] | ({name: value} if name in saved["data"] else {})
            try:
                now = settled(changed, words)
            except ValueError as error:  # the model is another: no flag overrides that
                assert (kind, str(value) in str(error)) == ("error", True), name
                continue
            facts = manifest.facts_of(now, saved["data"], world_size=1, precision="float32")
            if kind == "error" and not given(name, saved["args"]):
                assert now[name] == value  # left out: as it was
                continue
            facts |= {"samples_per_step": 4, "revision": saved["manifest"]["revision"]}
            before = {"arguments": changed["args"], "data": saved["data"], **saved["manifest"]}
            result, said = manifest.differences(before, facts, decisive)
            found = "error" if result else "said" if said else "free"
            assert found == kind, (name, result, said)
            assert found == "free" or (result + said)[0].startswith(f"--{name} "), name


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--lr", "0.5"], "--lr 0.5 (was 0.001)"),
        (["--seed", "7"], "--seed 7 (was 202307)"),
        (["--batch_size", "2"], "samples per step (--batch_size x processes) 2 (was 4)"),
    ],
)
def test_what_changes_the_result_needs_override(
    copy: Path, store: Path, capsys: Any, words: list[str], wanted: str
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    how = [
        *AGAIN,
        *words,
        "--data_root",
        store,
        "--output_dir",
        copy,
        "--resume",
        copy / "last.pth",
    ]
    assert_refused(run(capsys, *how), copy / "last.pth", wanted, "--override")
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    result = run(capsys, *how, "--override")
    assert result.code == 0, result.err
    assert f"--override: the result changes: {wanted}" in result.out


def test_other_data_need_override(copy: Path, tmp_path: Path, capsys: Any) -> None:
    other = slice_store(tmp_path / "other", train=7)
    how = [*AGAIN, "--data_root", other, "--output_dir", copy, "--resume", "auto"]
    assert_refused(run(capsys, *how), "the data's digest", "--override")
    result = run(capsys, *how, "--override", "--epochs", "4")
    assert result.code == 0, result.err
    assert "the data's digest" in result.out
    assert "--epochs 4 (was 3)" in result.out


def test_the_manifest_tells_what_the_run_is_made_from(trained: Path, store: Path) -> None:
    found = json.loads((trained / "manifest.json").read_text(encoding="utf-8"))
    assert found["arguments"]["lr"] == 0.001
    assert found["data"]["digest"] == json.loads(json.dumps(found["data"]))["digest"]
    assert (found["seed"], found["world_size"], found["samples_per_step"]) == (202307, 1, 4)
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["revision"] is None or len(found["revision"].removesuffix("-dirty")) == 40
    assert [start["epoch"] for start in found["starts"]] == [0]
    saved = torch.load(trained / "last.pth", weights_only=True)["manifest"]
    assert saved == {key: found[key] for key in saved}
    assert saved.keys() == found.keys() - {"format", "arguments", "data", "starts"}


# ---------------------------------------------------------------------- another folder


def test_another_folder_takes_the_best_along(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "other"
    how = [*AGAIN, "--data_root", store, "--output_dir", folder]
    result = run(capsys, *how, "--resume", trained / "last.1.pth", "--epochs", "3")
    assert result.code == 0, result.err
    assert f"copied {trained / 'best'}" in result.out
    found = torch.load(folder / "best.pth", weights_only=True)
    wanted = torch.load(trained / "best.pth", weights_only=True)
    assert found["best"] == wanted["best"]
    torch.testing.assert_close(found["model"], wanted["model"], rtol=0, atol=0)


def test_without_a_best_to_take_along_the_best_is_looked_for_anew(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "other"
    alone.mkdir()
    shutil.copy(trained / "last.pth", alone)
    how = [*AGAIN, "--data_root", store, "--output_dir", folder, "--resume", alone / "last.pth"]
    result = run(capsys, *how, "--epochs", "4")
    assert result.code == 0, result.err
    assert "best score reset" in result.out
    assert torch.load(folder / "best.pth", weights_only=True)["best"]["epoch"] == 3


# --------------------------------------------------------------------------- predecessors


def kept(folder: Path) -> dict[str, float]:
    return {path.name: value_of(path) for path in sorted(folder.glob("*.pth"))}


def test_predecessors_move_on_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    for value in range(30):
        checkpoint.save(path, state(value, 10), keep=2)
    assert kept(tmp_path) == {"last.pth": 29, "last.1.pth": 28, "last.2.pth": 27}
    checkpoint.save(path, state(30, 10), keep=1)
    assert kept(tmp_path) == {"last.pth": 30, "last.1.pth": 29}
    checkpoint.save(path, state(31, 10))
    assert kept(tmp_path) == {"last.pth": 31}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_saved_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth"
    for value in range(3):
        checkpoint.save(path, state(value, 10), keep=2)
    disk_full(monkeypatch, lambda name: name == "last.pth")
    with pytest.raises(OSError, match="could not save"):
        checkpoint.save(path, state(9, 10), keep=2)
    assert kept(tmp_path) == {"last.pth": 2, "last.1.pth": 1, "last.2.pth": 0}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "last.pth"
    for value in range(4):
        checkpoint.save(path, state(value, 10), keep=3)

    def refuse(self: Path, *, missing_ok: bool = False) -> None:
        if not missing_ok or self.exists():
            raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    checkpoint.save(path, state(4, 10), keep=1)
    assert "warning: could not remove an older version of last.pth" in capsys.readouterr().out
    assert (value_of(path), value_of(tmp_path / "last.1.pth")) == (4, 3)


def test_without_hard_links_no_predecessor_is_kept_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for value in range(2):
        checkpoint.save(tmp_path / "last.pth", state(value, 10), keep=1)
    assert kept(tmp_path) == {"last.pth": 1}
    assert "no backup of last.pth is kept" in capsys.readouterr().out


def test_names_of_predecessors_are_told_from_others(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    for name in (
        "last.pth",
        "last.2.pth",
        "last.10.pth",
        "last.x.pth",
        "last.01.pth",
        "last.0.pth",
    ):
        (tmp_path / name).touch()
    assert backups(path) == [backup(path, 2), backup(path, 10)]
