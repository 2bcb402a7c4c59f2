"""u-sam.py as users run it: resume, evaluation, several processes, and what it says to bad input.

Checks run in this process where that is the same; kills and launches are real processes.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.phantom import pelvis as phantom
from tests.helpers.command import (
    AGAIN,
    EPOCHS,
    RUN_FILES,
    SCRIPT,
    TINY,
    TRAINED,
    assert_refused,
    assert_same_run,
    environment,
    free_port,
    launch,
    run,
)
from tests.helpers.layouts import slice_store
from usam.training.checkpoint import CheckpointWriter


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run; `after-k` beside it holds what was there after k epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    save = CheckpointWriter.save

    def save_and_copy(self: CheckpointWriter, state: Any, *, as_best: bool, may_skip: bool) -> None:
        save(self, state, as_best=as_best, may_skip=False)
        self.finish()
        epochs = len((self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
        shutil.copytree(self.folder, self.folder.with_name(f"after-{epochs}"))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CheckpointWriter, "save", save_and_copy)
        patched.setattr(
            sys, "argv",
            ["u-sam.py", *TRAINED, "--data_root", str(store), "--output_dir", str(folder)],
        )  # fmt: skip
        runpy.run_path(SCRIPT, run_name="__main__")
    return folder


# ----------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("epochs", "flags"),
    [(1, ["--num_workers", "2"]), (2, [*AGAIN])],  # those left out are as they were
    ids=["no flags, two workers", "same flags, no workers"],
)
def test_a_run_resumed_after_any_epoch_equals_the_uninterrupted_one(
    trained: Path, store: Path, tmp_path: Path, capsys: Any, epochs: int, flags: list[str]
) -> None:
    again, others = tmp_path / "again", set(multiprocessing.active_children())
    shutil.copytree(trained.with_name(f"after-{epochs}"), again)
    result = run(
        capsys, *flags, "--device", "cpu", "--amp", "off", "--data_root", store,
        "--output_dir", again, "--resume", again / "last.pth",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert set(multiprocessing.active_children()) <= others  # workers end with the training
    assert_same_run(again, trained)


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "killed"
    flags = [*TRAINED, "--data_root", store, "--output_dir", folder, "--num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, flags)], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (folder / "last.pth").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) < EPOCHS
    result = run(capsys, *flags, "--resume", "auto")
    assert result.code == 0, result.err
    assert_same_run(folder, trained)


def test_a_resumed_run_may_go_further_at_other_rates(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    flags = ["--device", "cpu", "--amp", "off", "--num_workers", "0", "--data_root", store,
             "--output_dir", again, "--resume", again / "last.pth"]  # fmt: skip
    assert run(capsys, *flags).code == 0  # done already: nothing is left to do
    assert_same_run(again, trained)
    result = run(capsys, *flags, "--epochs", "4", "--lr", "0.5", "--override")
    assert result.code == 0, result.err
    assert "--override: the result changes: --lr 0.5 (was 0.001)" in result.out
    assert "--epochs 4 (was 3)" in result.out
    line = json.loads((again / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    # The last of two steps begins at 44 of 48 samples, 6 of them warm-up.
    assert (line["epoch"], line["lr"]) == (3, pytest.approx(0.5 * (1 - (44 - 6) / 48) ** 0.9))


def test_start_epoch_repeats_epochs_at_their_own_rates(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    result = run(
        capsys, "--device", "cpu", "--amp", "off", "--num_workers", "0", "--data_root", store,
        "--output_dir", again, "--resume", again / "last.pth", "--start_epoch", "2",
    )  # fmt: skip
    assert result.code == 0, result.err
    old, new = (
        [
            json.loads(line)
            for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for folder in (trained, again)
    )
    assert old[:2] == new[:2]
    assert [old[2][key] for key in ("epoch", "lr", "samples")] == [
        new[2][key] for key in ("epoch", "lr", "samples")
    ]
    assert old[2]["loss"] != new[2]["loss"]  # from other weights


def test_the_log_says_what_was_trained(trained: Path) -> None:
    lines = [
        json.loads(line)
        for line in (trained / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["epoch"] for line in lines] == list(range(EPOCHS))
    assert [line["samples"] for line in lines] == [12, 24, 36]
    assert all(line["skipped_steps"] == 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    best = torch.load(trained / "best.pth", weights_only=True)["best"]
    scores = [line["val"]["mean_dice"] for line in lines]
    assert best == {"epoch": scores.index(max(scores)), "mean_dice": max(scores)}


# ------------------------------------------------------------------------------- evaluation


def test_evaluation_prints_the_same_numbers_twice_and_draws_overlays(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--dataset", "store", "--data_root", store, "--device", "cpu", "--amp", "off",
             "--num_workers", "0", "--eval", "--resume", trained / "best.pth"]  # fmt: skip
    results = []
    for name in ("a", "b"):
        (tmp_path / name / "overlays").mkdir(parents=True)
        (tmp_path / name / "overlays" / "of_another_model.png").touch()
        result = run(capsys, *flags, "--output_dir", tmp_path / name)
        assert result.code == 0, result.err
        results.append(result.out.replace(str(tmp_path / name), "FOLDER"))
    assert results[0] == results[1]
    assert (
        "best.pth on 6 test slices of 2 cases of store; prompts: 3 points per class" in (results[0])
    )
    assert re.search(r"\norgan +0\.\d{4}  0\.\d{4}\ntumour ", results[0])
    metrics = [(tmp_path / name / "metrics.json").read_bytes() for name in ("a", "b")]
    assert metrics[0] == metrics[1]
    drawn = [sorted(p.name for p in (tmp_path / n / "overlays").iterdir()) for n in ("a", "b")]
    assert drawn[0] == drawn[1]
    assert drawn[0] == [f"test{case}_slice{k}.png" for case in (0, 1) for k in range(3)]
    assert f"overlay: FOLDER/overlays/{drawn[0][0]}, with 5 more beside it" in results[0]
    assert not (tmp_path / "a" / "log.jsonl").exists()
    other = run(capsys, *flags, "--output_dir", tmp_path / "a", "--prompt_mode", "0")
    assert "prompts: none" in other.out


# ------------------------------------------------------------------- what a run says


def test_checkpoints_of_another_model_are_refused_with_both_numbers(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    more = slice_store(tmp_path / "more", num_classes=4)
    best = trained / "best.pth"
    evaluation = ("--dataset", "store", "--device", "cpu", "--eval", "--resume", best)
    result = run(capsys, *evaluation, "--data_root", more)
    assert_refused(result, best, "3 classes", "has 4")
    result = run(capsys, *evaluation, "--data_root", store, "--img_size", "64")
    assert_refused(result, best, "--img_size 64", "32")
    result = run(capsys, *evaluation, "--data_root", store, "--sam_model", "vit_b")
    assert_refused(result, best, "--sam_model vit_b", "vit_tiny")
    result = run(capsys, *AGAIN, "--data_root", store, "--resume", best)
    assert_refused(result, best, "weights only", "last.pth")


def test_validation_on_the_test_cases_and_an_earlier_runs_files_are_said(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    flags = [*TRAINED, "--data_root", store, "--output_dir", folder, "--val_fraction", "0"]
    result = run(capsys, *flags, "--epochs", "1", "--prompt_mode", "0", "--batch_size", "8")
    assert result.code == 0, result.err
    assert "--val_fraction 0: best.pth is chosen on the test cases" in result.out
    assert "18 training slices, 6 to validate on" in result.out
    assert f"moved an earlier run's files to {folder / 'previous-1'}" in result.out
    assert_same_run(folder / "previous-1", trained)
    assert len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_too_few_cases_to_validate_on_are_said_and_best_is_the_last_epoch(
    tmp_path: Path, capsys: Any
) -> None:
    few = slice_store(tmp_path / "few", train=2)
    folder = tmp_path / "run"
    result = run(
        capsys, *TRAINED, "--data_root", few, "--output_dir", folder, "--epochs", "2",
        "--batch_size", "8",  # more than there are: the only, incomplete batch is kept
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "too few training cases for validation: best.pth is the last epoch" in result.out
    assert "6 training slices, 0 to validate on" in result.out
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pth", "best.pth"))
    assert best["best"] == {"epoch": 1, "mean_dice": None}
    torch.testing.assert_close(best["model"], last["model"], rtol=0, atol=0)
    assert all("val" not in json.loads(line) for line in (folder / "log.jsonl").open())


# ------------------------------------------------------------------------- several processes


def test_two_processes_train_the_phantom_and_evaluate_as_one(tmp_path: Path, capsys: Any) -> None:
    root = phantom.build(tmp_path / "phantom", train_cases=6, test_cases=3, num_slices=3)
    data = ["--dataset", "phantom", "--data_root", root, "--batch_size", "3"]
    folder = tmp_path / "run"
    result = launch(
        "bash", "train_sam.sh", *TINY, *data, "--epochs", "2", "--val_fraction", "0.34",
        "--output_dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 processes on cpu" in result.stdout
    assert "Warning" not in result.stderr
    said = result.stdout.splitlines()
    assert [sum(line.startswith(f"epoch {n}:") for line in said) for n in (0, 1, 2)] == [1, 1, 0]
    assert sum("next: python u-sam.py" in line for line in said) == 1
    lines = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(line["epoch"], line["samples"]) for line in lines] == [(0, 12), (1, 24)]
    names = {p.name for p in folder.iterdir()}
    assert names - {"best.1.pth", "last.1.pth"} == RUN_FILES

    evaluation = ["--eval", "--resume", folder / "best.pth", "--device", "cpu", "--amp", "off",
                  *data, "--batch_size", "1", "--output_dir"]  # fmt: skip
    result = launch(
        sys.executable, "-m", "torch.distributed.launch", "--master_port", str(free_port()),
        "--nproc_per_node=2", "--use_env", "u-sam.py", *evaluation, tmp_path / "two",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("9 test slices of 3 cases") == 1
    assert run(capsys, *evaluation, tmp_path / "one").code == 0
    for file in ("metrics.json", "report/cases.csv", "report/report.html"):
        one, two = ((tmp_path / name / file).read_text(encoding="utf-8") for name in ("one", "two"))
        assert one == two, file


def test_an_error_in_one_process_ends_all_and_is_shown(tmp_path: Path) -> None:
    started = time.monotonic()
    result = launch(
        "bash", "train_sam.sh", *TINY, "--dataset", "rectum", "--data_root", tmp_path / "none"
    )
    assert result.returncode != 0
    assert time.monotonic() - started < 200  # not the 30 minutes a process would wait for another
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("u-sam.py: error:")]
    assert "no slices under" in line
