"""The race: who is tested, which results count, and its statistics by hand-computed cases."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.race import scores, table
from benchmarks.race.data import split_cases
from benchmarks.race.rows import ROWS, USAM, Run, is_done, runs_of, usam_flags
from benchmarks.race.usam_row import fitting_epochs
from usam.cli import parser

ROW = {row.name: row for row in ROWS}


def run_of(name: str, seed: int = 1) -> Run:
    return Run("heart", "abc", ROW[name], seed, 6.0, "test", 160, 1)


def result(name: str, dice: list[list[float | None]], seed: int = 1) -> dict:
    """A result with a list of Dice by class for each patient; every class has 10 of 20 voxels."""
    patients = {
        f"p{number}": {"dice": one, "hd95": [2.0] * len(one), "counts": [[5, 10, 10]] * len(one)}
        for number, one in enumerate(dice)
    }
    return {
        "settings": run_of(name, seed).settings(), "title": ROW[name].title, "commit": "c0ffee",
        "date": "2026-01-02", "seed": seed, "seconds": 360.0, "steps": 100,
        "classes": ["left", "right"], "patients": patients,
    }  # fmt: skip


def test_patients_are_split_60_10_30_and_always_alike() -> None:
    cases = [f"case{number}" for number in range(80)]
    found = split_cases(cases)
    assert {end: len(part) for end, part in found.items()} == {"Tr": 48, "Val": 8, "Ts": 24}
    assert sorted(sum(found.values(), [])) == sorted(cases)
    assert split_cases(cases[::-1]) == found
    assert split_cases(cases, seed=20) != found
    with pytest.raises(ValueError, match="2 cases are too few"):
        split_cases(["a", "b"])


def test_a_result_counts_for_its_own_settings_and_commit_only(tmp_path: Path) -> None:
    path, run = tmp_path / "result.json", run_of("strong")
    assert not is_done(path, run, "c0ffee")
    path.write_text(json.dumps(result("strong", [[0.5, 0.5]])), encoding="utf-8")
    assert is_done(path, run, "c0ffee")
    assert not is_done(path, run, "other")
    assert is_done(path, run, None)
    for change in ({"minutes": 7.0}, {"seed": 2}, {"store": "abd"}, {"row": ROW["published"]}):
        assert not is_done(path, dataclasses.replace(run, **change), "c0ffee"), change


def test_rows_of_one_seed_run_once_and_all_flags_but_new_ones_parse() -> None:
    data = {"heart": {"digest": "abc", "img_size": 160}}
    runs = runs_of(ROWS, data, [1, 2, 3], minutes=6.0, split="test", cores=1)
    assert len({run.name for run in runs}) == len(runs) == 3 * len(ROWS) - 2
    for run in runs:
        words = usam_flags(run, Path("store"), Path("folder"))
        if run.row.kind == USAM and not {"auto", "--cache_embeddings"} & set(words):
            args = parser.parse_flags(words)
            assert (args.seed, args.batch_size) == (run.seed, 8)
            assert args.img_size == (128 if args.sam_model == "vit_t" else 160)


def test_epochs_fit_what_is_left_of_the_time() -> None:
    saved = {"progress": {"samples": 100, "epoch": 1}}
    # 0.2 s a slice; 100 - 3 - 25 - 5 = 67 s are left: 335 slices and the 100 that were seen.
    assert fitting_epochs(saved, slices=(105, 30), ready=5, now=25, limit=100) == 4
    # Before the first validation its 30 slices count a third each: 0.219 s, so 306 more, not 335.
    saved["progress"]["epoch"] = 0
    assert fitting_epochs(saved, slices=(105, 30), ready=5, now=25, limit=100) == 3
    assert fitting_epochs(saved, slices=(5000, 30), ready=5, now=25, limit=100) == 1


def test_the_paired_interval_is_of_differences_by_patient() -> None:
    theirs = {"a": 0.1, "b": 0.9, "c": 0.5}
    shifted = {name: value + 0.05 for name, value in theirs.items()}
    assert scores.paired_interval(shifted, theirs) == pytest.approx((0.05, 0.05, 0.05))
    # Two patients: a quarter of the resamples is all -0.1, a quarter all 0.3.
    ours = {"a": 0.0, "b": 1.2}
    assert scores.paired_interval(ours, {"a": 0.1, "b": 0.9}) == pytest.approx((0.1, -0.1, 0.3))
    with pytest.raises(ValueError, match="the same patients"):
        scores.paired_interval({"a": 0.1}, theirs)
    # 100 patients of 0 and 1: mean 0.5, 1.96 * sqrt(0.25 / 100) = 0.098 on either side.
    mean, low, high = scores.interval([0.0, 1.0] * 50)
    assert (mean, low, high) == pytest.approx((0.5, 0.402, 0.598), abs=0.011)


def test_scores_by_patient_and_pooled() -> None:
    runs = [
        result("strong", [[0.2, None], [0.4, 0.6]]),
        result("strong", [[0.4, None], [0.6, 0.8]]),
    ]
    assert scores.by_patient(runs) == pytest.approx({"p0": 0.3, "p1": 0.6})
    patients = {"a": {"counts": [[1, 2, 2], [0, 0, 0]]}, "b": {"counts": [[5, 6, 10], [0, 0, 0]]}}
    assert scores.pooled_dice(patients) == [pytest.approx(2 * 6 / 20), None]


def test_labels_are_scored_at_their_stored_size_and_none_may_be_missing() -> None:
    truth = np.zeros((1, 4, 4), np.uint8)
    truth[0, 0, :2] = 1

    class Store:
        cases = [{"id": "a", "split": "test"}, {"id": "b", "split": "train"}]
        classes = ["background", "organ", "other"]

        def arrays(self, number: int) -> tuple[None, np.ndarray]:
            return None, truth

    answer = np.zeros_like(truth)
    answer[0, 0, 1:3] = 1
    found = scores.score(Store(), {"a": answer}, "test")
    assert found == {
        "a": {"dice": [0.5, None], "hd95": [1.0, None], "counts": [[1, 2, 2], [0] * 3]}
    }
    for wrong in ({}, {"a": answer[:, :2]}):
        with pytest.raises(ValueError, match="case a: wanted labels"):
            scores.score(Store(), wrong, "test")


def test_the_table_ranks_all_rows_and_compares_with_the_best_peer() -> None:
    high, middle, low = [[0.9, 0.9], [0.8, 0.8]], [[0.8, 0.8], [0.7, 0.7]], [[0.1, 0.1]] * 2
    found = [result("strong", high, 1), result("strong", high, 2), result("published", low)]
    found += [result("unet-strong", middle), result("unet-published", [[0.5, 0.5]] * 2)]
    text = table.tables(found)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert "### heart: 6 minutes on 1 core, 2 test patients" in text
    names = ["strong", "unet-strong", "unet-published", "published"]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [ROW[name].title for name in names]
    assert "| 2 | 100 | 360 | 0.500 | 0.850 [0.800, 0.900], ± 0.000 over seeds |" in rows[0]
    assert rows[0].endswith("| +0.100 [+0.100, +0.100], better |")
    assert rows[1].endswith("| best peer |")
    assert rows[3].endswith("| -0.650 [-0.700, -0.600], worse |")
    assert "Seeds 1, 2; commit c0ffee; 2026-01-02." in text
