"""Faults of docs/reliability.md that no other room's tests inject, on real runs of u-sam.py."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import SliceStore, open_store
from dataset.prepare.sources import find_source
from dataset.prepare.volume_sources import find_volumes
from dataset.scans.find import find_scans
from dataset.store.slices import write_case, write_index
from tests.conftest import ROOT
from tests.helpers import layouts, volume_layouts
from tests.helpers.layouts import slice_store
from tests.stress import ranks, saves
from tests.stress.digest import run_digest
from tests.stress.injector import Injector, Operation, raising, wait_for
from tests.stress.runs import tiny_run
from tests.stress.runs.strikes import Strike
from usam.evaluation.metrics import ClassCounts
from usam.training import checkpoint
from usam.training.checkpoint import CheckpointWriter


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    tiny_run.warm_up()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slice_store(tmp_path_factory.mktemp("store"), train=4, **tiny_run.SMALL)


def run(
    store: Path, folder: Path, *flags: str, inject: Callable[[int], None] = lambda rank: None
) -> str:
    """What a run of u-sam.py on the tiny network printed; it must end with 0."""
    log = folder.with_suffix(".log")
    words = [*tiny_run.FLAGS, "--data_root", store, "--output_dir", folder, *flags]
    (child,) = tiny_run.start(words, log, inject=inject)
    assert wait_for(child) == 0, log.read_text(encoding="utf-8")
    return log.read_text(encoding="utf-8")


def lines_of(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


# ------------------------------------------------------------------ the table


def test_every_fault_has_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        names = re.findall(r"`(?:(test_\w+)::)?(test_\w+)`", row[3])
        assert names, row[1]
        file = ""
        for given, name in names:
            file = given or file
            whole = list((ROOT / "tests").rglob(f"{name}.py"))  # else a test of the last file named
            source, *others = whole or (ROOT / "tests").rglob(f"{file}.py")
            assert not others, f"two files of one name: {source} {others}"
            wanted = "" if whole else f"def {name}("
            assert wanted in source.read_text(encoding="utf-8"), f"{row[1]}: {file}::{name}"


# ------------------------------------------------------------------ saving


def test_thirty_saves_delete_a_file_only_after_its_successor_is_on_the_disk(tmp_path: Path) -> None:
    watcher = Injector(only=lambda path: path.startswith(str(tmp_path)))
    writer = CheckpointWriter(tmp_path, keep=1)
    for number in range(30):
        with watcher.watching():
            writer.save(
                lambda number=number: saves.small_state(number), as_best=True, may_skip=False
            )
            writer.finish()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.1.pth", "best.pth", "last.1.pth", "last.pth"]
    assert torch.load(tmp_path / "last.pth", weights_only=True)["progress"]["samples"] == 29
    assert torch.load(tmp_path / "last.1.pth", weights_only=True)["progress"]["samples"] == 28
    assert_committed_first(watcher.seen, tmp_path)


def assert_committed_first(seen: list[Operation], folder: Path) -> None:
    """No whole file loses its last name before the folder with its successor was synced."""
    gone = 0
    for place, operation in enumerate(seen):
        file = Path(operation.path).name
        overwritten = Path(operation.other).name if operation.name == "replace" else ""
        lost = file if operation.name in ("unlink", "remove") else overwritten
        if lost not in ("last.1.pth", "best.1.pth"):
            continue
        gone += 1
        successor = lost.replace(".1", "")
        since = [number for number, op in enumerate(seen[:place]) if op.other.endswith(successor)]
        assert since, f"{lost} went before any {successor} was committed"
        synced = [op for op in seen[since[-1] : place] if op == Operation("fsync", str(folder))]
        assert synced, f"{lost} went before {successor} was on the disk"
    assert gone >= 2 * 28


def test_files_that_cannot_be_deleted_stop_no_save(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        checkpoint.save(tmp_path / "last.pth", saves.small_state(number), keep=3)
    act = raising(PermissionError(1, "Operation not permitted"))
    monkeypatch.setattr("os.unlink", lambda *_, **__: act())
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: act())
    checkpoint.save(tmp_path / "last.pth", saves.small_state(9), keep=0)
    assert "could not remove an older version" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pth", weights_only=True)["progress"]["samples"] == 9


def test_a_run_without_any_score_keeps_its_files(store: Path, tmp_path: Path) -> None:
    def no_score(rank: int) -> None:
        summary = ClassCounts.summary

        def absent(self: ClassCounts, names: list[str], **how: bool) -> dict:
            found = summary(self, names, **how)
            nothing = dict.fromkeys(found["dice"])
            return found | {"dice": nothing, "mean_dice": None, "mean_iou": None}

        ClassCounts.summary = absent

    folder = tmp_path / "run"
    run(store, folder, "--epochs", "2", "--batch_size", "4", "--val_fraction", "0.34",
        inject=no_score)  # fmt: skip
    for name in ("best.pth", "last.pth"):
        assert torch.load(folder / name, weights_only=True)["progress"]["epoch"] > 0
    assert [line["val"]["mean_dice"] for line in lines_of(folder)] == [None, None]
    assert "NaN" not in (folder / "log.jsonl").read_text(encoding="utf-8")


# ------------------------------------------------------------------ data


def empty_store(folder: Path) -> Path:
    """A store whose every mask is empty."""
    cases = []
    for name, split in (("a", "train"), ("b", "train"), ("c", "test")):
        entry = {"id": name, "split": split, "file": name, "slices": [f"{name}{k}" for k in "0123"]}
        image = np.random.default_rng(ord(name)).integers(0, 256, (4, 16, 16), dtype=np.uint8)
        cases.append(write_case(folder, entry, image, np.zeros_like(image)))
    write_index(folder, {
        "dataset": "folder", "window": [-160, 240], "orientation": "LPS", "clahe": True,
        "source": "0", "cases": cases,
        "classes": [{"id": i, "name": n, "color": "#00ff00"} for i, n in enumerate("abc")],
    })  # fmt: skip
    return folder


def test_a_data_set_of_empty_masks_trains_and_evaluates_every_slice(tmp_path: Path) -> None:
    root, folder = empty_store(tmp_path / "empty"), tmp_path / "run"
    run(root, folder, "--epochs", "1", "--batch_size", "2", "--val_fraction", "0.4")
    (line,) = lines_of(folder)
    assert line["samples"] == 8
    assert np.isfinite(line["loss"])
    words = ["--dataset", "store", "--data_root", root, "--device", "cpu", "--amp", "off",
             "--eval", "--resume", folder / "best.pth",
             "--output_dir", tmp_path / "scores"]  # fmt: skip
    log = tmp_path / "log"
    (child,) = tiny_run.start(words, log)
    assert wait_for(child) == 0, log.read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["slices"] == 4


def shuffled(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Folders list their files in another order, as another machine's file system may."""
    draw = random.Random(seed)
    iterdir, glob = Path.iterdir, Path.glob

    def in_any_order(listing: Callable) -> Callable:
        def listed(*args: object, **how: object) -> list[Path]:
            found = sorted(listing(*args, **how))
            draw.shuffle(found)
            return iter(found)

        return listed

    monkeypatch.setattr(Path, "iterdir", in_any_order(iterdir))
    monkeypatch.setattr(Path, "glob", in_any_order(glob))


def test_the_order_of_listings_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"case{n}_slice{k}" for n in (2, 1, 10) for k in range(4)]
    layouts.word(tmp_path / "word", {"Tr": [3, 1, 2], "Ts": [9, 8]})
    volume_layouts.layout(tmp_path / "volumes")
    found = []
    for seed in range(4):
        care = layouts.care(tmp_path / f"care{seed}", {"train": names, "test": ["case3_slice0"]})
        with monkeypatch.context() as patched:
            shuffled(patched, seed)
            index = open_store("rectum", care).index
            del index["source"]  # holds the times of the files, which differ between the copies
            found.append((
                json.dumps(index, sort_keys=True),
                [case.id for case in find_source("word", tmp_path / "word").cases],
                [case.id for case in find_volumes([tmp_path / "volumes"]).cases],
                find_scans([tmp_path / "word" / "imagesTr"]),
            ))  # fmt: skip
    assert all(of_seed == found[0] for of_seed in found)
    assert all(found[0])


# ------------------------------------------------------------------ numbers and processes


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_batches_of_one_train_and_are_warned_of(
    store: Path, tmp_path: Path, batch_size: str
) -> None:
    folder = tmp_path / "run"
    said = run(store, folder, "--epochs", "1", "--batch_size", batch_size)
    assert ("warning: --batch_size 1" in said) == (batch_size == "1")
    (line,) = lines_of(folder)
    assert np.isfinite(line["loss"])
    statistics = torch.load(folder / "last.pth", weights_only=True)["model"]["norm.running_var"]
    assert torch.isfinite(statistics).all()


def test_any_number_of_workers_ends_in_the_same_state(store: Path, tmp_path: Path) -> None:
    digests = set()
    for workers in ("0", "1", "2"):
        folder = tmp_path / workers
        run(store, folder, "--epochs", "2", "--batch_size", "4", "--num_workers", workers)
        digests.add(run_digest(folder))
    assert len(digests) == 1


def test_launches_at_the_same_time_do_not_meet(store: Path, tmp_path: Path) -> None:
    nobody = Strike("forward", 0, 99, "SIGKILL", str(tmp_path / "struck"))
    flags = [*ranks.RUN, "--data_root", str(store), "--output_dir"]
    launches = {}
    for number in range(3):
        log = tmp_path / f"{number}.log"
        words = [*flags, str(tmp_path / f"run{number}")]
        launches[ranks.begin(2, words, nobody, log=log, launched=False)] = log
    for launch, log in launches.items():
        assert wait_for(launch) == 0, log.read_text(encoding="utf-8")
    assert len({run_digest(tmp_path / f"run{number}") for number in range(3)}) == 1


def test_the_digest_of_a_store_is_that_of_its_index(tmp_path: Path) -> None:
    root = slice_store(tmp_path / "store", train=1, **tiny_run.SMALL)
    digest = SliceStore(root).digest
    assert SliceStore(root).digest == digest
    (root / "index.json").write_text((root / "index.json").read_text(encoding="utf-8") + " ")
    assert SliceStore(root).digest != digest
