"""u-sam.py as users run it: resume, evaluation, several processes, and what it says to bad input.

Checks run in this process where that is the same; kills and launches are real processes.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dataset import DATASETS, phantom
from dataset.slices import write_case, write_index
from tests import layouts
from tests.conftest import ROOT
from usam import checkpoint, flags
from usam.run_folder import RunFolder

SCRIPT = str(ROOT / "u-sam.py")
TINY = ("--sam_model", "vit_tiny", "--sam_weight", "none", "--img_size", "32", "--device", "cpu",
        "--amp", "off", "--num_workers", "0")  # fmt: skip
TRAINED = (*TINY, "--epochs", "3", "--batch_size", "4", "--accumulation_steps", "2",
           "--prompt_mode", "3", "--warmup", "--clip_max_norm", "1", "--val_fraction", "0.34",
           "--dataset", "store")  # fmt: skip
AGAIN = tuple(word for word in TRAINED if word not in ("--sam_weight", "none"))  # with --resume
EPOCHS = 3
SAVING = ("save_every", "keep", "override", "world_size", "dist_url")  # and how it is launched
RUN_FILES = {"best.pth", "last.pth", "log.jsonl", "manifest.json", "curves.png"}
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Result(NamedTuple):
    """How a run ended and what it wrote."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture, *arguments: str | Path) -> Result:
    """`python u-sam.py arguments`, in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["u-sam.py", *map(str, arguments)])
        for name in LAUNCH_VARIABLES:
            patched.delenv(name, raising=False)
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    return Result(code, *capsys.readouterr())


def environment() -> dict[str, str]:
    """This process's variables, with its Python first and without a launcher's."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    folder = Path(sys.executable).parent
    return kept | {"PATH": f"{folder}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def make_store(folder: Path, *, train: int = 6, num_classes: int = 3) -> Path:
    """A slice store of 32-pixel cases of three slices, one block a class; two test cases."""
    cases, rng = [], np.random.default_rng(0)
    for split, count in (("train", train), ("test", 2)):
        for number in range(count):
            image = rng.integers(0, 80, (3, 32, 32)).astype(np.uint8)
            mask = np.zeros((3, 32, 32), np.uint8)
            for label in range(1, num_classes):
                x, y = rng.integers(2, 22, 2)
                mask[:, y : y + 8, x : x + 8] = label
            name = f"{split}{number}"
            entry = {"id": name, "split": split, "file": name}
            entry["slices"] = [f"{name}_slice{k}" for k in range(3)]
            cases.append(write_case(folder, entry, image + 40 * mask, mask))
    names = ["background", "organ", "tumour", "vessel"][:num_classes]
    rows = zip(names, ["#000000", "#00ff00", "#ff0000", "#0000ff"], strict=False)
    write_index(folder, {
        "dataset": "folder", "window": [-160, 240], "orientation": "LPS", "clahe": True,
        "source": "0", "cases": cases,
        "classes": [{"id": i, "name": n, "color": c} for i, (n, c) in enumerate(rows)],
    })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run; `after-k` beside it holds what was there after k epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    save = RunFolder.save

    def save_and_copy(self: RunFolder, state: Any, *, as_best: bool, may_skip: bool) -> None:
        save(self, state, as_best=as_best, may_skip=False)
        self.finish()
        epochs = len((self.path / "log.jsonl").read_text(encoding="utf-8").splitlines())
        shutil.copytree(self.path, self.path.with_name(f"after-{epochs}"))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "save", save_and_copy)
        patched.setattr(
            sys, "argv",
            ["u-sam.py", *TRAINED, "--data_root", str(store), "--output_dir", str(folder)],
        )  # fmt: skip
        runpy.run_path(SCRIPT, run_name="__main__")
    return folder


# ----------------------------------------------------------------------------------- resume


def assert_same_run(found: Path, wanted: Path) -> None:
    """Same log byte for byte, same state but for the flags that no number depends on."""
    assert (found / "log.jsonl").read_bytes() == (wanted / "log.jsonl").read_bytes()
    for name in ("last.pth", "best.pth"):
        states = [torch.load(run / name, weights_only=True) for run in (found, wanted)]
        for state in states:
            for flag in ("output_dir", "resume", "sam_weight", "num_workers", *SAVING):
                del state["args"][flag]
            del state["manifest"]  # with the revision, which may change while tests run
        first, second = (dict(leaves(state)) for state in states)
        assert first.keys() == second.keys()
        assert [key for key in first if first[key] != second[key]] == []


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists with its path; tensors as type, shape and bytes."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(state, list):
        for number, value in enumerate(state):
            yield from leaves(value, f"{path}/{number}")
    elif isinstance(state, torch.Tensor):
        yield path, (state.dtype, state.shape, state.numpy().tobytes())
    else:
        yield path, state


@pytest.mark.parametrize(
    ("epochs", "flags"),
    [(1, ["--num_workers", "2"]), (2, [*AGAIN])],  # those left out are as they were
    ids=["no flags, two workers", "same flags, no workers"],
)
def test_a_run_resumed_after_any_epoch_equals_the_uninterrupted_one(
    trained: Path, store: Path, tmp_path: Path, capsys: Any, epochs: int, flags: list[str]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained.with_name(f"after-{epochs}"), again)
    result = run(
        capsys, *flags, "--device", "cpu", "--amp", "off", "--data_root", store,
        "--output_dir", again, "--resume", again / "last.pth",
    )  # fmt: skip
    assert result.code == 0, result.err
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
    assert "--override: goes on, and the result changes: --lr 0.5 (was 0.001)" in result.out
    assert "otherwise than before: --epochs 4 (was 3)" in result.out
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
        result = run(capsys, *flags, "--output_dir", tmp_path / name)
        assert result.code == 0, result.err
        results.append(result.out.replace(str(tmp_path / name), "FOLDER"))
    assert results[0] == results[1]
    assert "best.pth on 6 test slices of 2 cases of store; prompts: 3 points a class" in results[0]
    assert re.search(r"\norgan +0\.\d{4}  0\.\d{4}\ntumour ", results[0])
    metrics = [(tmp_path / name / "metrics.json").read_bytes() for name in ("a", "b")]
    assert metrics[0] == metrics[1]
    drawn = [sorted(p.name for p in (tmp_path / n / "overlays").iterdir()) for n in ("a", "b")]
    assert drawn[0] == drawn[1]
    assert {name.partition("_")[0] for name in drawn[0]} <= {"test0", "test1"}
    assert f"overlay: FOLDER/overlays/{drawn[0][0]}" in results[0]
    assert not (tmp_path / "a" / "log.jsonl").exists()
    other = run(capsys, *flags, "--output_dir", tmp_path / "a", "--prompt_mode", "0")
    assert "prompts: none" in other.out


# ------------------------------------------------------------------- what a run says


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
    few = make_store(tmp_path / "few", train=2)
    folder = tmp_path / "run"
    result = run(
        capsys, *TRAINED, "--data_root", few, "--output_dir", folder, "--epochs", "2",
        "--batch_size", "8",  # more than there are: the only, incomplete batch is kept
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "too few training cases to set some aside: best.pth holds the last epoch" in result.out
    assert "6 training slices, 0 to validate on" in result.out
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pth", "best.pth"))
    assert best["best"] == {"epoch": 1, "mean_dice": None}
    torch.testing.assert_close(best["model"], last["model"], rtol=0, atol=0)
    assert all("val" not in json.loads(line) for line in (folder / "log.jsonl").open())


# ------------------------------------------------------------------------- several processes


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def launch(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], env=environment(), cwd=ROOT, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip


def test_two_processes_train_the_phantom_and_evaluate_as_one(tmp_path: Path, capsys: Any) -> None:
    root = phantom.build(tmp_path / "phantom", train_cases=6, test_cases=3, num_slices=3)
    data = ["--dataset", "phantom", "--data_root", root, "--batch_size", "3"]
    folder = tmp_path / "run"
    result = launch(
        "bash", "train_sam.sh", *TINY, *data, "--epochs", "2", "--val_fraction", "0.34",
        "--output_dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 process(es) on cpu" in result.stdout
    said = result.stdout.splitlines()
    assert [sum(line.startswith(f"epoch {n}:") for line in said) for n in (0, 1, 2)] == [1, 1, 0]
    assert sum("best.pth, last.pth and log.jsonl in" in line for line in said) == 1
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


# --------------------------------------------------------------------------------- bad input


def assert_refused(result: Result, *wanted: str | Path) -> None:
    """Code 2 and one line on stderr (progress bars aside) that holds all that is wanted."""
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("u-sam.py: error: ")
    for part in wanted:
        assert str(part) in lines[0]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--img_size", "100"], ["--img_size 100", "multiple of 16"]),
        (["--img_size", "0"], ["--img_size", "0 is below 1"]),
        (["--eval"], ["--eval needs --resume"]),
        (["--dataset", "rectal"], ["--dataset", "rectal", "rectum", "phantom"]),
        (["--prompt_mode", "4"], ["--prompt_mode", "4"]),
        (["--lr", "nan"], ["--lr", "nan is not a finite number"]),
        (["--lr_vit", "-1"], ["--lr_vit", "-1"]),
        (["--epochs", "0"], ["--epochs", "0 is below 1"]),
        (["--batch_size", "two"], ["--batch_size", "two"]),
        (["--seed", "-3"], ["--seed", "-3"]),
        (["--val_fraction", "1"], ["--val_fraction 1.0", "below 1"]),
        (["--val_fraction", "0", "--fold", "0"], ["--fold says who validates", "--val_fraction"]),
        (["--sam_model", "vit_x"], ["--sam_model", "vit_x", "vit_b"]),
        (["--amp", "fp8"], ["--amp", "fp8", "bf16"]),
        (["--device", "gpu"], ["--device gpu", "cuda"]),
        (["--world_size", "2"], ["--world_size 2", "torchrun"]),
        (["--no_such_flag"], ["--no_such_flag"]),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    arguments: list[str], wanted: list[str], capsys: Any
) -> None:
    assert_refused(run(capsys, *arguments), *wanted)


def test_cuda_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(run(capsys, "--device", "cuda"), "--device cuda", "--device cpu")


def test_missing_data_names_the_folder_the_layout_and_the_phantom(
    tmp_path: Path, capsys: Any
) -> None:
    missing = tmp_path / "nowhere"
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", missing)
    assert_refused(result, missing, "train/train_npz/NAME.npz", "--dataset phantom")
    result = run(capsys, *TINY, "--dataset", "store", "--data_root", missing)
    assert_refused(result, missing, "index.json")
    assert_refused(run(capsys, *TINY, "--dataset", "store"), "--data_root")


def test_a_real_process_leaves_with_code_2_and_one_line(tmp_path: Path) -> None:
    result = launch(sys.executable, SCRIPT, *TINY, "--data_root", tmp_path / "nowhere")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.fixture
def care(tmp_path: Path) -> Iterator[Path]:
    """A CARE release to spoil; its test split is fine."""
    names = [f"case1_slice{k}" for k in range(2)]
    yield layouts.care(tmp_path / "care", {"train": names, "test": ["case2_slice0"]})


def spoil(care: Path, **arrays: Any) -> Path:
    path = care / "train" / "train_npz" / "case1_slice1.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("key", ["image", "label"])
def test_an_npz_without_image_or_label_is_named(care: Path, key: str, capsys: Any) -> None:
    other = {"image": "label", "label": "image"}[key]
    path = spoil(care, **{other: np.zeros((32, 32))})
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", care)
    assert_refused(result, path, f"no array '{key}'")


def test_labels_out_of_range_are_named(care: Path, capsys: Any) -> None:
    path = spoil(care, image=np.zeros((32, 32)), label=np.full((32, 32), 7.0))
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", care)
    assert_refused(result, path, "label ids 7")


def test_a_csv_that_names_a_missing_file_is_named(care: Path, capsys: Any) -> None:
    table = care / "train" / "train_bbox.csv"
    table.write_text(table.read_text(encoding="utf-8") + 'case9_slice9,"[1, 2, 3, 4]"\n')
    result = run(capsys, *TINY, "--dataset", "rectum", "--data_root", care)
    assert_refused(result, table, "case9_slice9")


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_fault_found_while_loading_is_one_line(
    tmp_path: Path, num_workers: str, capsys: Any
) -> None:
    root = make_store(tmp_path / "store")
    for path in sorted((root / "cases").glob("train*.mask.npy")):
        np.save(path, np.full((3, 32, 32), 9, np.uint8))
    result = run(
        capsys, *TRAINED, "--data_root", root, "--output_dir", tmp_path / "run",
        "--num_workers", num_workers,
    )  # fmt: skip
    assert_refused(result, "label 9 is outside the table of 3 classes")


def test_checkpoints_that_are_missing_or_something_else_are_named(
    tmp_path: Path, store: Path, capsys: Any
) -> None:
    missing, broken, other = (tmp_path / name for name in ("none.pth", "cut.pth", "other.pth"))
    broken.write_bytes(b"PK\x03\x04 cut short")
    checkpoint.save(other, {"format": 1})
    flags = (*AGAIN, "--data_root", store, "--output_dir", tmp_path / "run")
    assert_refused(run(capsys, *flags, "--resume", missing), f"no checkpoint at {missing}")
    assert_refused(run(capsys, *flags, "--eval", "--resume", missing), missing)
    assert_refused(run(capsys, *flags, "--resume", broken), broken, "damaged")
    assert_refused(run(capsys, *flags, "--resume", other), other)
    weights = tmp_path / "sam.pth"
    result = run(capsys, *flags, "--sam_weight", weights)
    assert_refused(result, f"no SAM checkpoint at {weights}")
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_another_model_are_refused_with_both_numbers(
    trained: Path, store: Path, tmp_path: Path, capsys: Any
) -> None:
    more = make_store(tmp_path / "more", num_classes=4)
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


def test_an_output_folder_that_is_a_file_is_named(store: Path, tmp_path: Path, capsys: Any) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    assert_refused(run(capsys, *TRAINED, "--data_root", store, "--output_dir", taken), taken)


# ------------------------------------------------------------------------------------- flags


PUBLISHED_FLAGS = {
    "--prompt_mode", "--warmup", "--lr", "--lr_vit", "--lr_backbone", "--batch_size",
    "--weight_decay", "--epochs", "--clip_max_norm", "--img_size", "--dataset", "--output_dir",
    "--device", "--seed", "--resume", "--start_epoch", "--eval", "--num_workers", "--world_size",
    "--dist_url", "--data_root", "--model", "--sam_model", "--sam_weight", "--amp",
}  # fmt: skip


def test_flags_keep_their_published_names() -> None:
    assert {f"--{name}" for name in vars(flags.parse_flags(DATASETS, []))} >= PUBLISHED_FLAGS


@pytest.mark.parametrize(
    "command",
    [
        "--epochs 100 --batch_size 24 --dataset rectum",
        "--num_workers 4 --epochs 100 --batch_size 24 --dataset rectum",
        "--dataset rectum --eval --resume chkpt/best.pth",
    ],
)
def test_published_commands_parse(command: str) -> None:
    assert flags.parse_flags(DATASETS, shlex.split(command)).dataset == "rectum"


def test_every_flag_is_read() -> None:
    text = Path(SCRIPT).read_text(encoding="utf-8") + (ROOT / "sam_med3d.py").read_text(
        encoding="utf-8"
    )
    text += (ROOT / "training.py").read_text(encoding="utf-8") + (ROOT / "evaluation.py").read_text(
        encoding="utf-8"
    )
    unread = [
        name
        for name in vars(flags.parse_flags(DATASETS, []))
        if not re.search(rf"args\.{name}\b", text)
    ]
    assert not unread


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
    args = flags.parse_flags(DATASETS, given + (["--empty", value] if value else []))
    flags.settle(args, None)
    load_split = runpy.run_path(SCRIPT, run_name="u_sam")["load_split"]
    assert len(load_split(args, "train")) == number
    assert len(load_split(args, "test")) == 3


@pytest.mark.parametrize("given", [["--empty", "drop"], ["--init", "chkpt/best.pth"]])
def test_flags_of_the_other_model_are_refused(given: list[str]) -> None:
    args = flags.parse_flags([*DATASETS, "phantom3d"], ["--model", "sam-med3d", *given])
    with pytest.raises(ValueError, match=f"{given[0]} is not for --model sam-med3d"):
        flags.settle(args, None)


def test_defaults_are_the_published_ones() -> None:
    args = flags.parse_flags(DATASETS, [])
    flags.settle(args, None)
    wanted = {
        "epochs": 100, "batch_size": 24, "num_workers": 2, "img_size": 224, "seed": 202307,
        "lr": 1e-3, "lr_vit": 1e-4, "lr_backbone": 1e-4, "weight_decay": 1e-4, "prompt_mode": 0,
        "clip_max_norm": 0, "accumulation_steps": 1, "val_fraction": 0.1, "dataset": "rectum",
        "sam_model": "vit_b", "model": "u-sam", "output_dir": Path("chkpt"), "amp": "auto",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
