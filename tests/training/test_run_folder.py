"""The run folder: earlier runs move aside, a resumed run keeps its files, logs are strict JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.test_checkpoint import value_of
from usam.training.checkpoint import CheckpointWriter
from usam.training.run_folder import RunFolder


def fill(folder: RunFolder, epochs: range) -> None:
    for epoch in epochs:
        folder.log({"epoch": epoch, "loss": 0.5})
    writer, state = CheckpointWriter(folder.path), {"weights": torch.full((3,), epochs[-1] * 1.0)}
    writer.save(lambda: {"model": state, **state}, as_best=True, may_skip=False)
    writer.finish()


def logged(path: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_fresh_run_moves_an_earlier_runs_files_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    fill(RunFolder(run, None, 0), range(2))
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    (run / "overlays").mkdir()
    (run / "overlays" / "a.png").touch()
    assert capsys.readouterr().out == ""
    fill(RunFolder(run, None, 0), range(5))
    assert f"moved an earlier run's files to {run / 'previous-1'}" in capsys.readouterr().out
    fill(RunFolder(run, None, 0), range(7))
    assert "previous-2" in capsys.readouterr().out
    kept = [run / "previous-1" / "last.pth", run / "previous-2" / "last.pth", run / "last.pth"]
    assert [value_of(path) for path in kept] == [1, 4, 6]
    assert (run / "previous-1" / "overlays" / "a.png").exists()
    assert [logged(path.with_name("log.jsonl"))[-1] for path in kept] == [1, 4, 6]
    assert sorted(path.name for path in run.iterdir()) == [
        "best.pth", "last.pth", "log.jsonl", "notes.txt", "previous-1", "previous-2",
    ]  # fmt: skip


def test_a_resumed_run_keeps_its_files_and_cuts_the_log_back(tmp_path: Path) -> None:
    fill(RunFolder(tmp_path, None, 0), range(4))
    text = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    (tmp_path / "log.jsonl").write_text(
        text + '{"epoch": 4, "lo', encoding="utf-8"
    )  # cut short by a kill
    folder = RunFolder(tmp_path, tmp_path / "last.pth", 3)
    assert logged(tmp_path / "log.jsonl") == [0, 1, 2]
    folder.log({"epoch": 3, "loss": 0.5})
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pth", "last.pth", "log.jsonl",
    ]  # fmt: skip


def test_a_run_resumed_into_another_folder_leaves_the_old_one_alone(tmp_path: Path) -> None:
    fill(RunFolder(tmp_path / "a", None, 0), range(2))
    fill(RunFolder(tmp_path / "b", None, 0), range(3))
    fill(RunFolder(tmp_path / "b", tmp_path / "a" / "last.pth", 2), range(2, 6))
    assert logged(tmp_path / "a" / "log.jsonl") == [0, 1]
    assert logged(tmp_path / "b" / "log.jsonl") == [2, 3, 4, 5]
    assert logged(tmp_path / "b" / "previous-1" / "log.jsonl") == [0, 1, 2]


def test_half_written_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".last.pth.4711.tmp").write_bytes(b"half")
    fill(RunFolder(tmp_path, None, 0), range(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pth", "last.pth", "log.jsonl"]


def test_the_log_is_strict_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, None, 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.log({"epoch": 0, "loss": float("nan")})
    folder.log({"epoch": 0, "loss": None})
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == '{"epoch": 0, "loss": null}\n'
