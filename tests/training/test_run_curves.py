"""Curves of a run: a picture that follows the log, at little cost, and TensorBoard's events."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest

from usam.training import curves as run_curves
from usam.training.curves import RunCurves, scalars


def line(epoch: int, loss: float | None = 0.5, dice: float | None = 0.7) -> dict[str, Any]:
    val = {"dice": {"background": 0.99, "a$b^$c": dice}, "mean_dice": dice}
    return {"epoch": epoch, "loss": loss, "lr": 1e-3, "val": val}


def log(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8"
    )


def test_a_picture_follows_the_log_over_gaps(tmp_path: Path) -> None:
    curves = RunCurves(tmp_path, tensorboard=False, first_epoch=0)
    without = {key: value for key, value in line(2).items() if key != "val"}
    log(tmp_path, line(0), line(1, loss=None, dice=None), without)
    curves.add(without, last=True)
    height, width, _ = cv2.imread(str(tmp_path / "curves.png")).shape
    assert (width, height) == (1200, 400)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


def test_a_run_that_never_validates_has_its_loss_alone(tmp_path: Path) -> None:
    lines = [{"epoch": 0, "loss": 1.0, "lr": 1e-3}]
    log(tmp_path, *lines)
    RunCurves(tmp_path, tensorboard=False, first_epoch=0).add(lines[0], last=True)
    assert cv2.imread(str(tmp_path / "curves.png")).shape[1] == 640


def test_drawing_takes_a_tenth_of_the_time_and_the_last_is_never_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, drawn = [100.0], []

    def draw(path: Path, lines: list) -> None:
        now[0] += 0.3
        drawn.append(len(lines))
        path.touch()

    monkeypatch.setattr(run_curves.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run_curves, "draw_run_curves", draw)
    curves = RunCurves(tmp_path, tensorboard=False, first_epoch=0)
    for epoch in range(40):
        now[0] += 1.0
        log(tmp_path, *(line(number) for number in range(epoch + 1)))
        curves.add(line(epoch), last=epoch == 39)
    assert drawn[-1] == 40
    assert drawn[0] == 1
    assert 10 <= len(drawn) <= 15  # every third epoch of a second
    drawn.clear()
    for epoch in range(5):
        now[0] += 60.0
        curves.add(line(epoch), last=False)
    assert len(drawn) == 5


def test_scalars_are_named_by_what_they_are() -> None:
    assert scalars(line(0)) == {
        "loss": 0.5, "learning_rate": 1e-3, "dice/background": 0.99, "dice/a$b^$c": 0.7,
        "dice/mean": 0.7,
    }  # fmt: skip
    assert scalars(line(0, loss=None, dice=None)) == {
        "learning_rate": 1e-3, "dice/background": 0.99
    }  # fmt: skip


def test_tensorboard_holds_what_the_log_holds(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    curves = RunCurves(tmp_path, tensorboard=True, first_epoch=0)
    for epoch in range(2):
        log(tmp_path, *(line(number) for number in range(epoch + 1)))
        curves.add(line(epoch, loss=0.5 - epoch / 4), last=epoch == 1)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(0, 0.5), (1, 0.25)]
    assert "dice/mean" in found.Tags()["scalars"]


def test_without_tensorboard_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard.*pip install tensorboard"):
        RunCurves(tmp_path, tensorboard=True, first_epoch=0)
    RunCurves(tmp_path, tensorboard=False, first_epoch=0)
