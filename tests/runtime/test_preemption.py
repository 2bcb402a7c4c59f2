"""Runs stopped by a signal: saved where they are, and resumed to exactly the same end.

Stops within one process are signals it sends itself; launches are real processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.command import (
    SCRIPT,
    TRAINED,
    Result,
    assert_same_run,
    environment,
    free_port,
    run,
)
from tests.helpers.layouts import slice_store
from tests.helpers.toy import Slices
from usam.evaluation import pixels
from usam.runtime import signals as preemption
from usam.runtime.loaders import loader_for
from usam.runtime.signals import SIGNALS, STOPPED, StoppableBatches, StopRequest
from usam.training import engine
from usam.training import run as training_run
from usam.training.checkpoint import CheckpointWriter
from usam.training.run_folder import RunFolder

Flags = Callable[[Path], list[str]]


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """A program that stopped itself ignores further signals until it ends; this one goes on."""
    yield
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """The command of a run into a folder, always the same one, as a queue gives it again."""
    store = slice_store(tmp_path_factory.mktemp("store"))
    return lambda folder: [
        *TRAINED, "--data_root", str(store), "--output_dir", str(folder), "--resume", "auto",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped: three epochs of two steps, of three batches."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    launched(*flags(folder)).wait(timeout=300)
    return folder


def launched(
    *arguments: str, launcher: tuple[str, ...] = (), variables: dict[str, str] | None = None
) -> subprocess.Popen:
    """A run of its own, the first of a process group, its output kept."""
    return subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, *arguments], env=environment() | (variables or {}),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def stopping(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Make the call numbered `call`, from 1, of a function send this process two signals."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def signalled(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*given, **named)

    patch.setattr(owner, name, signalled)


def stopped_run(capsys: Any, flags: list[str], owner: Any, name: str, **how: Any) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, owner, name, **how)
        return run(capsys, *flags)


# ---------------------------------------------------------------------- in one process


def test_a_run_stopped_before_each_validation_ends_as_the_uninterrupted_one(
    flags: Flags, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, where = tmp_path / "run", []
    result = Result(STOPPED, "", "")
    while result.code == STOPPED:
        result = stopped_run(capsys, flags(folder), engine, "_optimizer_step", call=2)
        saved = torch.load(folder / "last.pth", weights_only=True)
        where.append((saved["progress"]["epoch"], saved["progress"]["step"], result.code))
    # The step that the signal comes in is finished: of two steps an epoch, the second of each run.
    assert where == [(1, 0, 75), (2, 0, 75), (3, 0, 75), (3, 0, 0)]
    assert_same_run(folder, whole)


def test_a_second_ctrl_c_ends_at_once(flags: Flags, tmp_path: Path, capsys: Any) -> None:
    real = engine._optimizer_step

    def impatient(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_optimizer_step", impatient)
        result = run(capsys, *flags(tmp_path / "run"))
    assert result.code == 130
    assert result.err.splitlines()[-1] == "u-sam.py: interrupted"
    assert not (tmp_path / "run" / "last.pth").exists()


def test_a_run_stopped_within_epochs_ends_as_the_uninterrupted_one(
    flags: Flags, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, steps = tmp_path / "run", []
    result = stopped_run(capsys, flags(folder), engine, "_optimizer_step", call=1)
    while result.code == STOPPED:
        saved = torch.load(folder / "last.pth", weights_only=True)
        steps.append((saved["progress"]["epoch"], saved["progress"]["step"]))
        assert f"resume with --resume {folder / 'last.pth'}" in result.out
        result = stopped_run(capsys, flags(folder), engine, "_optimizer_step", call=1)
        assert "--resume auto: resuming from" in result.out
    assert steps == [(0, 2), (1, 0), (1, 2), (2, 0), (2, 2), (3, 0)]
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("owner", "name", "call", "epoch"),
    [
        (pixels, "predictions", 2, 2),  # within the second validation
        (RunFolder, "log", 1, 1),
        (CheckpointWriter, "save", 1, 1),
    ],
)
def test_a_signal_while_validating_or_saving_leads_to_a_saved_state(
    flags: Flags, whole: Path, tmp_path: Path, capsys: Any,
    owner: Any, name: str, call: int, epoch: int,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    result = stopped_run(capsys, flags(folder), owner, name, call=call)
    assert result.code == STOPPED, result.err
    saved = torch.load(folder / "last.pth", weights_only=True)
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (epoch, 0)
    assert ("unvalidated" in saved) == (name == "predictions")
    assert len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert run(capsys, *flags(folder)).code == 0
    assert_same_run(folder, whole)


def test_saves_within_epochs_change_nothing_and_are_gone_on_from(
    flags: Flags, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, saved = tmp_path / "run", []
    save = CheckpointWriter.save

    def save_and_copy(self: CheckpointWriter, state: Any, **how: Any) -> None:
        save(self, state, **how)
        self.finish()
        saved.append(torch.load(self.folder / "last.pth", weights_only=True)["progress"])
        shutil.copytree(self.folder, tmp_path / f"copy-{len(saved)}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "is_due", property(lambda self: True))
        patch.setattr(CheckpointWriter, "save", save_and_copy)
        assert run(capsys, *flags(folder), "--save_every", "1", "--keep", "3").code == 0
    places = [(progress["epoch"], progress["step"]) for progress in saved]
    assert places == [(epoch, step) for end in (1, 2, 3) for epoch, step in (
        (end - 1, 2), (end - 1, 3), (end, 0))]  # fmt: skip
    assert_same_run(folder, whole)
    assert sorted(path.name for path in folder.glob("last*")) == [
        "last.1.pth", "last.2.pth", "last.3.pth", "last.pth",
    ]  # fmt: skip
    for number in (4, 5):
        copy = tmp_path / f"copy-{number}"
        assert run(capsys, *flags(copy)).code == 0
        assert_same_run(copy, whole)


def test_before_training_a_signal_ends_the_run_with_the_same_code(
    flags: Flags, tmp_path: Path, capsys: Any
) -> None:
    result = stopped_run(capsys, flags(tmp_path / "run"), training_run, "build_optimizer", call=1)
    assert result.code == STOPPED
    assert "stopped by SIGTERM before training: nothing to save" in result.out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not list((tmp_path / "run").glob("*.pth"))


# ----------------------------------------------------------------------------- the flag


def test_an_evaluation_ends_early_only_when_asked() -> None:
    loader = DataLoader(Slices(7), batch_size=2)
    with StopRequest() as stop:
        stop.watch()
        batches = iter(StoppableBatches(loader, stop))
        assert len(next(batches)["id"]) == 2
        os.kill(os.getpid(), signal.SIGUSR1)
        assert list(batches) == []
        assert stop.agreed
    with StopRequest() as stop:
        stop.watch()
        assert sum(len(batch["id"]) for batch in StoppableBatches(loader, stop)) == 7


def test_workers_ignore_stop_signals_to_the_whole_group_but_end_with_their_process() -> None:
    loader = loader_for(Slices(40), 2, batch_size=2)
    batches = iter(loader)
    workers = [worker.pid for worker in batches._workers]  # which have hardly started
    for worker in workers:
        # Sent by another process, as a scheduler's; torch itself sends from ours.
        subprocess.run(["kill", "-TERM", str(worker)], check=True)
        subprocess.run(["kill", "-USR1", str(worker)], check=True)
    assert sum(1 for _ in batches) == 20
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    for worker in batches._workers:
        worker.terminate()
        worker.join(timeout=10)
        assert worker.exitcode == 0


# ------------------------------------------------------------------------ real processes


def wait_for_lines(folder: Path, number: int, process: subprocess.Popen) -> None:
    log = folder / "log.jsonl"
    while process.poll() is None and not (
        log.exists() and log.read_text(encoding="utf-8").count("\n") >= number
    ):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]


def test_a_process_group_that_is_signalled_goes_on_as_if_nothing_had_been(
    flags: Flags, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "run"
    process = launched(*flags(folder), "--num_workers", "2")
    wait_for_lines(folder, 1, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its loaders' workers, too
    out = process.communicate(timeout=120)[0]
    assert process.returncode == STOPPED, out
    assert "stopped by a signal" in out
    assert run(capsys, *flags(folder)).code == 0
    assert_same_run(folder, whole)
    starts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["starts"]
    assert [start["resumed"] for start in starts] == [None, str(folder / "last.pth")]


def test_ctrl_c_that_also_ends_the_reader_of_the_output_saves(flags: Flags, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launched(*flags(folder), "--epochs", "1000")
    wait_for_lines(folder, 1, process)
    process.send_signal(signal.SIGINT)
    process.stdout.close()  # as of `| tee log`
    assert process.wait(timeout=120) == STOPPED
    saved = torch.load(folder / "last.pth", weights_only=True)
    assert 1 <= saved["progress"]["epoch"] < 1000


def pids_of_ranks(launcher: int) -> dict[str, int]:
    """The processes that a launcher started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(
                (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
            )
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [v[5:].decode() for v in variables if v.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(folder.name)
    return found


def started_by_srun(*arguments: str) -> list[subprocess.Popen]:
    """Two processes as `srun` starts them, each with its rank and no launcher above them."""
    where = ("--world_size", "2", "--dist_url", f"tcp://127.0.0.1:{free_port()}")
    ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
    return [launched(*arguments, *where, variables=variables) for variables in ranks]


def test_of_two_processes_either_one_or_the_launcher_stops_both(
    flags: Flags, tmp_path: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    wanted, folder = tmp_path / "whole", tmp_path / "run"
    processes = started_by_srun(*flags(wanted), "--epochs", "5")
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for lines, told in ((1, "a rank"), (3, "the launcher")):
        process = launched(*flags(folder), "--epochs", "5", launcher=launcher)
        wait_for_lines(folder, lines, process)
        ranks = pids_of_ranks(process.pid)
        assert len(ranks) == 2
        if told == "a rank":
            os.kill(ranks["1"], signal.SIGUSR1)
        else:
            process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=120)[0]
        assert process.returncode != 0
        assert out.count("stopped by a signal") == 1, out
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    process = launched(*flags(folder), "--epochs", "5", launcher=launcher)
    assert process.wait(timeout=300) == 0
    assert_same_run(folder, wanted)


def test_the_flag_is_exchanged_at_least_once_a_second_or_every_call(monkeypatch: Any) -> None:
    now, exchanged = [0.0], []
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preemption.dist, "all_reduce", lambda *_, **__: exchanged.append(now[0]))
    stop = StopRequest()
    stop._group = object()
    for seconds in [0.2] * 50 + [0.04] * 500 + [3.0] * 20:
        stop.asked(at_once=not exchanged)
        now[0] += seconds
    gaps = [after - before for before, after in zip(exchanged, exchanged[1:], strict=False)]
    assert max(gap for gap, at in zip(gaps, exchanged, strict=False) if at < 29) <= 1
    slow = [at for at in exchanged if at > 30 + 16 * 3]
    assert [round(b - a) for a, b in zip(slow, slow[1:], strict=False)] == [3] * (len(slow) - 1)
    assert len(exchanged) < 200
