"""A sample of every part of tests.stress, and proof that its checks fail where they should."""

from __future__ import annotations

import copy
import faulthandler
import io
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stress import cost, counts, files, flags, ranks, resume, saves
from tests.stress.digest import PARTS, leaves, state_digest
from tests.stress.hostile.kinds import Kind
from tests.stress.injector import Injector, Moment, in_a_child, raising, wait_for
from tests.stress.rows import Row, summary
from tests.stress.runs.strikes import Strike
from usam.training import checkpoint


def assert_good(row: Row) -> None:
    assert row.number > 0
    assert not row.faults, summary(row.faults)


# ------------------------------------------------------------------ samples


def test_kills_while_saving_leave_a_readable_file() -> None:
    row = saves.run_kills(80)
    assert_good(row)
    assert row.note.startswith("80 hit")


def test_power_cuts_while_saving_leave_a_readable_file() -> None:
    assert_good(saves.run_power_cuts(saves=2))


def test_broken_and_hostile_files_are_read_or_refused() -> None:
    (row,) = files.run_files(600)
    assert_good(row)


def test_drawn_command_lines_are_refused_or_understood() -> None:
    for row in (flags.run_lines(400), flags.run_processes(2)):
        assert_good(row)


def test_evaluation_counts_are_those_of_one_process() -> None:
    row = counts.run_counts(range(1, 6))
    assert_good(row)
    assert row.number == 5 * 4


def test_a_dying_rank_ends_the_run() -> None:
    assert_good(ranks.run_deaths(3, 0))


@pytest.mark.parametrize("step", [4, 23])  # within an accumulation; in the last step of all
def test_runs_resumed_after_a_stop_equal_the_uninterrupted_one(step: int) -> None:
    row = resume.run_resumes([step], 0)
    assert_good(row)
    assert row.number == 8


def test_a_stop_flag_reaches_all_processes_within_a_second() -> None:
    assert_good(cost.run_flag(1))


# ------------------------------------------------------------------ checks that can fail


def state(number: int) -> dict[str, Any]:
    return saves.small_state(number)


def without_a_temporary_file(folder: Path, number: int, done: Callable[[int], None]) -> None:
    with open(folder / "last.pth", "wb") as file:
        torch.save(state(number), file)
        file.flush()
        os.fsync(file.fileno())
    done(number)


def without_fsync(folder: Path, number: int, done: Callable[[int], None]) -> None:
    with open(folder / ".last", "wb") as file:
        torch.save(state(number), file)
    os.replace(folder / ".last", folder / "last.pth")
    done(number)


def without_a_synced_folder(folder: Path, number: int, done: Callable[[int], None]) -> None:
    with open(folder / ".last", "wb") as file:
        torch.save(state(number), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / ".last", folder / "last.pth")
    done(number)


def test_kills_find_a_save_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saves, "SAVERS", (without_a_temporary_file,) * 2)
    assert any("not readable" in fault for fault in saves.run_kills(30).faults)


@pytest.mark.parametrize("save", [without_fsync, without_a_synced_folder])
def test_power_cuts_find_a_save_that_is_not_synced(
    save: saves.Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "SAVERS", (save,))
    assert saves.run_power_cuts(saves=2).faults


def careless_reader(how: str) -> Callable[[Path], Any]:
    """A reader with one fault, for files whose first byte is not `good`'s."""

    def read(folder: Path) -> Any:
        content = (folder / "file").read_bytes()
        if content == b"good":
            return content
        return {
            "type": lambda: content + "text",
            "message": lambda: (_ for _ in ()).throw(ValueError()),
            "lines": lambda: (_ for _ in ()).throw(ValueError("one\ntwo")),
            "code": lambda: pickle.load(io.BytesIO(content)),
            "memory": lambda: bytearray(2 << 30),
            "hang": lambda: [None for _ in iter(int, 1)],
            "crash": lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)),
        }[how]()

    return read


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("type", "TypeError"),
        ("message", "without a message"),
        ("lines", "a message of 2 lines"),
        ("code", "its code ran"),
        ("memory", "MemoryError"),
        ("hang", "took over"),
        ("crash", "the worker ended with -11"),
    ],
)
def test_careless_readers_are_found(how: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(draw: Any, canary: Path) -> bytes:
        return f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()

    kind = Kind("text", "file", b"good", careless_reader(how), (bad,))
    monkeypatch.setattr(Kind, "broken", lambda self, draw, canary: bad(draw, canary))
    monkeypatch.setattr(files, "all_kinds", lambda: [kind])
    monkeypatch.setattr(files, "MAX_SECONDS", 0.5)
    (row,) = files.run_files(2)
    assert len(row.faults) == 2
    assert all(wanted in fault for fault in row.faults)


@pytest.mark.parametrize("part", PARTS)
def test_the_digest_sees_one_bit_of_every_part(part: str) -> None:
    before = saves.small_state(1) | {"scaler": {"scale": 1.0}}
    changed = copy.deepcopy(before)
    assert state_digest(before) == state_digest(changed | {"args": {"output_dir": "elsewhere"}})
    place = (
        next(value for _, value in _tensors(changed[part])) if part in ("model", "rng") else None
    )
    if place is None:
        changed[part] = {**changed[part], "more": 0}
    else:
        place.view(-1).view(torch.uint8)[0] ^= 1
    assert state_digest(before) != state_digest(changed)


def _tensors(content: Any, path: str = "") -> Any:
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{path}/{key}", value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{path}/{key}")


def test_the_digest_sees_the_log_but_not_the_clock() -> None:
    held = state(1)
    first = state_digest(held, '{"epoch": 0, "loss": 1.0, "seconds": 3}\n')
    assert first == state_digest(held, '{"epoch": 0, "loss": 1.0, "seconds": 4}\n')
    assert first != state_digest(held, '{"epoch": 0, "loss": 1.5, "seconds": 3}\n')
    assert dict(leaves({"a": 0.0})) != dict(leaves({"a": -0.0}))


# ------------------------------------------------------------------ the injector


def test_the_injector_sees_every_operation_of_a_save(tmp_path: Path) -> None:
    watcher = Injector()
    with watcher.watching():
        checkpoint.save(tmp_path / "last.pth", state(1))
    names = [operation.name for operation in watcher.seen]
    assert names[0] == "open"
    assert names[-3:] == ["fsync", "replace", "fsync"]
    assert set(names[1:-3]) == {"write"}
    written = b"".join(operation.data for operation in watcher.seen)
    assert written == (tmp_path / "last.pth").read_bytes()
    assert watcher.seen[-1].path == str(tmp_path)


def test_the_injector_strikes_within_a_write(tmp_path: Path) -> None:
    def work() -> None:
        with Injector(Moment(1, "within", 100)).watching():
            checkpoint.save(tmp_path / "last.pth", state(1))

    assert wait_for(in_a_child(work)) == -signal.SIGKILL
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.stat().st_size == 100


@pytest.mark.parametrize("number", [0, *range(3, 8)])
def test_an_error_at_any_operation_is_told_and_leaves_the_old_file(
    tmp_path: Path, number: int
) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save(path, state(1))
    error = OSError(28, "No space left on device")
    with (
        Injector(Moment(number), raising(error)).watching(),
        pytest.raises(OSError, match=r"could not save .*last\.pth.*No space left"),
    ):
        checkpoint.save(path, state(2))
    held = torch.load(path, weights_only=True)["progress"]["samples"]
    assert held == (2 if number == 7 else 1)  # the last operation syncs a folder already renamed in
    assert list(tmp_path.iterdir()) == [path]


def test_a_strike_of_another_rank_changes_nothing(tmp_path: Path) -> None:
    before = vars(resume).copy()
    Strike("save", 0, 1, "SIGKILL", str(tmp_path / "note")).install(rank=0)
    assert vars(resume) == before
    assert not (tmp_path / "note").exists()
