"""Checkpoints: whole or not at all, plain inside, nothing lost on the way."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.toy import FLOAT32, Toy, one_group
from usam.training import checkpoint, manifest
from usam.training.checkpoint import CheckpointWriter, Progress, TrainingState
from usam.training.ema import WeightAverage
from usam.weights.state_dict import load_model_state

BIG = 300_000  # numbers, 1.2 MB


def state(value: float, number: int = BIG) -> dict[str, Any]:
    return {"weights": torch.full((number,), value)}


def value_of(path: Path) -> float:
    """The one value that a whole file made by `state` holds."""
    (value,) = torch.load(path, weights_only=True)["weights"].unique().tolist()
    return value


def in_a_child(work: Callable[[], None]) -> int:
    """The number of a forked process that does `work` and leaves with code 0, or 1 on an error."""
    if not (number := os.fork()):
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads do not survive the fork
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return number


def disk_full(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool]) -> None:
    """Makes `os.replace` fail for files whose name `fails` is true of."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if fails(Path(target).name):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


# ---------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("zip")])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(content: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    path = tmp_path / "last.pth"
    checkpoint.save(path, state(1))
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match=r"could not save .*last\.pth"):
        checkpoint.save(path, state(2))
    assert value_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_grow_is_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save(path, state(1))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        try:
            checkpoint.save(path, state(2))
        except OSError:
            return
        raise AssertionError("the write went through")

    assert os.waitpid(in_a_child(work), 0)[1] == 0
    assert value_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not save .*gone/last\.pth"):
        checkpoint.save(tmp_path / "gone" / "last.pth", state(1))


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save(path, state(-1))

    def work() -> None:
        for number in range(10**6):
            checkpoint.save(path, state(number))

    generator = random.Random(0)
    for _ in range(8):
        before, child = path.stat().st_ino, in_a_child(work)
        while path.stat().st_ino == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert value_of(path) >= 0


# ---------------------------------------------------------------------- in the background


def test_what_is_saved_is_the_state_at_the_time_of_asking(tmp_path: Path) -> None:
    saver, weights = CheckpointWriter(tmp_path), torch.ones(BIG)
    saver.submit({tmp_path / "last.pth": {"weights": weights}})
    weights += 1
    saver.finish()
    assert value_of(tmp_path / "last.pth") == 1


def test_weights_of_both_files_are_copied_once() -> None:
    weights = torch.ones(2)
    copied = checkpoint.to_cpu({"best": {"model": weights}, "last": [weights, weights[:1]]})
    assert copied["best"]["model"] is copied["last"][0]
    assert copied["last"][0].data_ptr() != weights.data_ptr()
    assert copied["last"][1].tolist() == [1]


def test_failed_saves_are_reported_and_the_third_in_a_row_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    failing, saver, path = [True], CheckpointWriter(tmp_path), tmp_path / "last.pth"
    disk_full(monkeypatch, lambda _: failing[0])
    for value in (1, 2):
        saver.submit({path: state(value)})
        saver.wait()
        assert "No space left on device; training continues" in capsys.readouterr().out
    failing[0] = False
    saver.submit({path: state(3)})
    saver.wait()
    assert value_of(path) == 3
    failing[0] = True
    for value in (4, 5):  # counted anew
        saver.submit({path: state(value)})
        saver.wait()
    saver.submit({path: state(6)})
    with pytest.raises(OSError, match=r"could not save .*last\.pth.*No space left"):
        saver.wait()
    assert value_of(path) == 3


def test_a_best_that_could_not_be_written_is_written_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [True]
    disk_full(monkeypatch, lambda name: failing[0] and name == "best.pth")
    best, last, saver = tmp_path / "best.pth", tmp_path / "last.pth", CheckpointWriter(tmp_path)
    saver.submit({best: state(1), last: state(1)})
    saver.wait()
    assert value_of(last) == 1
    failing[0] = False
    saver.submit({last: state(2)})
    saver.finish()
    assert (value_of(best), value_of(last)) == (1, 2)


def test_the_end_of_a_run_tries_again_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([True, False, True, True])
    disk_full(monkeypatch, lambda _: next(failures))
    saver, path = CheckpointWriter(tmp_path), tmp_path / "last.pth"
    saver.submit({path: state(1)})
    saver.finish()
    assert value_of(path) == 1
    saver.submit({path: state(2)})
    with pytest.raises(OSError, match=r"could not save .*last\.pth"):
        saver.finish()
    assert value_of(path) == 1


def test_very_short_epochs_pass_saves_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = CheckpointWriter(tmp_path)
    assert saver.is_due
    clock = iter([100.0, 101.0])  # a write of one second
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: next(clock))
        saver.submit({tmp_path / "last.pth": state(1)})
        saver.wait()
    for now, due in ((105.0, False), (109.9, False), (110.1, True)):
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda now=now: now)
            assert saver.is_due == due


# --------------------------------------------------------------------------- what is inside


def toy_state(model: Toy | None = None) -> TrainingState:
    """The state of a toy run after one step."""
    model = model or Toy()
    optimizer = one_group(model)
    model(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    facts = {
        "arguments": manifest.plain(
            {"output_dir": Path("chkpt"), "lr": 1e-3, "resume": None, "sizes": [1, 2]}
        ),
        "data": {"classes": ["background", "tumour"], "img_size": 32},
        "world_size": 1,
    }
    found = TrainingState(model, optimizer, FLOAT32.scaler(), WeightAverage(model, 0.0), facts)
    found.progress = Progress(epoch=2, step=1, samples=30)
    found.best = {"epoch": 1, "mean_dice": 0.5}
    return found


def save_now(folder: Path, whole: dict[str, Any], *, as_best: bool) -> None:
    writer = CheckpointWriter(folder)
    writer.save(lambda: whole, as_best=as_best, may_skip=False)
    writer.finish()


def test_checkpoints_load_without_running_code_and_hold_plain_types(tmp_path: Path) -> None:
    whole = toy_state().state_dict()
    save_now(tmp_path, whole, as_best=True)
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    best = torch.load(tmp_path / "best.pth", weights_only=True)
    assert last["args"] == {"output_dir": "chkpt", "lr": 1e-3, "resume": None, "sizes": "[1, 2]"}
    assert last["format"] == 1
    assert last["progress"] == vars(Progress(epoch=2, step=1, samples=30))
    assert set(last) - set(best) == {"optimizer", "scaler", "rng"}
    torch.testing.assert_close(last["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(best["model"], whole["model"], rtol=0, atol=0)


def test_an_optimizer_restored_from_a_file_steps_as_the_old_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    old = Toy()
    first = toy_state(old)
    save_now(tmp_path, first.state_dict(), as_best=False)
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    new = Toy()
    load_model_state(new, saved["model"], tmp_path)
    second = TrainingState(new, one_group(new), FLOAT32.scaler(), WeightAverage(new, 0.0), {})
    second.load_state_dict(saved)
    assert (second.progress, second.best) == (first.progress, first.best)
    for model, optimizer in ((old, first.optimizer), (new, second.optimizer)):
        optimizer.zero_grad()
        model(torch.ones(2, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rng.pth"
    draws = []
    random.seed(4)
    np.random.seed(4)
    np.random.standard_normal()  # leaves a second value waiting
    random.gauss(0, 1)
    checkpoint.save(path, checkpoint.random_state())
    for _ in range(2):
        checkpoint.restore_random_state(torch.load(path, weights_only=True))
        draws.append(
            [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()]
            + [np.random.standard_normal() for _ in range(3)]
        )
        random.seed(9)
        np.random.seed(9)
        torch.manual_seed(9)
    assert draws[0] == draws[1]


def test_numpys_waiting_normal_value_comes_back() -> None:
    np.random.seed(4)
    np.random.standard_normal()
    kept = checkpoint.random_state()
    wanted = np.random.standard_normal()
    np.random.seed(9)
    checkpoint.restore_random_state(kept)
    assert np.random.standard_normal() == wanted


def test_weights_of_another_model_are_refused_by_name() -> None:
    model, weights = Toy(), Toy().state_dict()
    source = Path("a.pth")
    without = {name: value for name, value in weights.items() if name != "inner.weight"}
    with pytest.raises(ValueError, match=r"a\.pth .* missing inner\.weight"):
        load_model_state(model, without, source)
    with pytest.raises(ValueError, match=r"unexpected more"):
        load_model_state(model, weights | {"more": torch.ones(1)}, source)
    other = Toy(num_classes=4).state_dict()
    with pytest.raises(ValueError, match=r"a\.pth: outer\.\w+ has shape \(4.*this model needs \(3"):
        load_model_state(model, other, source)
