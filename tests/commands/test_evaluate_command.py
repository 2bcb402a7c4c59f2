"""--eval as users run it: reports, folds and their merging, ensembles, views, prompts, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset.files import write_json
from dataset.splits import split_table
from tests.helpers.command import TINY, assert_refused, run
from tests.helpers.described import assert_described
from tests.helpers.layouts import slice_store

SHORT = (*TINY, "--epochs", "1", "--batch_size", "4", "--dataset", "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training cases in two folds, two test cases."""
    folder = slice_store(tmp_path_factory.mktemp("store"))
    pairs = [(f"train{number}", "train") for number in range(6)]
    write_json(folder / "splits.json", split_table(pairs, folds=2, seed=1))
    return folder


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders fold0 and fold1 of trained folds."""
    folder = tmp_path_factory.mktemp("runs")
    for fold in (0, 1):
        trained = run_quietly(
            *SHORT, "--data_root", store, "--fold", fold, "--seed", fold, "--prompt_mode", "1",
            "--output_dir", folder / f"fold{fold}",
        )  # fmt: skip
        assert trained.code == 0, trained.err
    return folder


class Quiet:
    """What `run` asks of capsys, where a fixture of a module has none."""

    def readouterr(self) -> tuple[str, str]:
        return "", ""


def run_quietly(*arguments: Any) -> Any:
    return run(Quiet(), *arguments)


def evaluation(store: Path, output: Path, *resume: Path) -> tuple[Any, ...]:
    flags = ("--device", "cpu", "--amp", "off", "--num_workers", "0", "--dataset", "store")
    return (*flags, "--data_root", store, "--output_dir", output, "--eval", "--resume", *resume)


def test_a_run_leaves_curves_and_names_its_prompts(runs: Path) -> None:
    assert (runs / "fold0" / "curves.png").stat().st_size > 5000
    (line,) = (runs / "fold0" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["val"]["prompts"] == "boxes around the true masks"
    assert_described(runs / "fold0")


def test_evaluation_writes_scores_where_they_were_and_a_report(
    store: Path, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    result = run(capsys, *evaluation(store, tmp_path, runs / "fold0" / "best.pth"))
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (found["slices"], found["cases"], found["split"]) == (6, 2, "test")
    assert found["per_case"]["unit"] == "pixels, voxels"
    assert np.array(found["counts"]).sum() > 0
    rows = list(csv.DictReader((tmp_path / "report" / "cases.csv").open()))
    assert [row["case"] for row in rows] == ["test0", "test0", "test1", "test1"]
    assert "by case (2 cases)" in result.out
    assert result.out.count("prompts: boxes around the true masks") == 2
    assert str(tmp_path / "report" / "report.html") in result.out
    assert "warning" not in result.out
    assert_described(tmp_path)
    spaced = evaluation(store, tmp_path / "mm", runs / "fold0" / "best.pth")
    assert run(capsys, *spaced, "--spacing", "5", "0.7", "0.7").code == 0
    again = json.loads((tmp_path / "mm" / "metrics.json").read_text(encoding="utf-8"))
    assert again["per_case"]["unit"] == "mm, ml"
    assert (again["dice"], again["counts"]) == (found["dice"], found["counts"])


def test_differently_prepared_slices_are_refused_or_named_in_the_report(
    store: Path, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    other = shutil.copytree(store, tmp_path / "other")
    index = json.loads((other / "index.json").read_text(encoding="utf-8"))
    index["window"], index["classes"][1]["name"] = [-100, 300], "bowel"
    (other / "index.json").write_text(json.dumps(index), encoding="utf-8")
    arguments = evaluation(other, tmp_path / "out", runs / "fold0" / "best.pth")
    wanted = ("window [-100, 300] (checkpoint: [-160, 240])", "bowel")
    assert_refused(run(capsys, *arguments), *wanted, "--override")
    result = run(capsys, *arguments, "--override")
    assert result.code == 0, result.err
    (note, *_) = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))["notes"]
    for text in (result.out, note, (tmp_path / "out" / "report" / "classes.md").read_text("utf-8")):
        assert all(part in text for part in wanted)
        assert "clahe" not in text


def test_answers_that_are_not_finite_are_an_error_that_names_the_slice(
    store: Path, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    saved = torch.load(runs / "fold0" / "best.pth", weights_only=True)
    last = "output_hypernetworks_mlps.0.layers.0.weight"
    (name,) = (name for name in saved["model"] if name.endswith(last))
    saved["model"][name].fill_(3e38)  # finite, unlike its product with anything
    torch.save(saved, tmp_path / "huge.pth")
    result = run(capsys, *evaluation(store, tmp_path / "out", tmp_path / "huge.pth"))
    assert_refused(result, "slice test0", "not finite")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_folds_are_evaluated_on_their_own_cases_and_merged(
    store: Path, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    for fold in (0, 1):
        best = runs / f"fold{fold}" / "best.pth"
        result = run(capsys, *evaluation(store, tmp_path / str(fold), best), "--fold", fold)
        assert result.code == 0, result.err
    folders = (tmp_path / "0", tmp_path / "1")
    result = run(capsys, "--merge", *folders, "--output_dir", tmp_path / "all")
    assert result.code == 0, result.err
    rows = list(csv.DictReader((tmp_path / "all" / "report" / "cases.csv").open()))
    assert sorted({row["case"] for row in rows}) == [f"train{number}" for number in range(6)]
    parts, found = (
        [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in chosen]
        for chosen in (folders, [tmp_path / "all"])
    )
    assert found[0]["counts"] == (np.array(parts[0]["counts"]) + parts[1]["counts"]).tolist()
    assert (found[0]["split"], found[0]["cases"]) == ("fold 0, fold 1", 6)
    assert "mean ± standard deviation over folders" in result.out
    wrong = evaluation(store, tmp_path / "wrong", runs / "fold0" / "best.pth")
    assert_refused(run(capsys, *wrong, "--fold", "1"), "was trained on 3 cases", "pass --override")
    onto = run(capsys, "--merge", *folders, "--output_dir", folders[1])
    assert_refused(onto, f"--output_dir {folders[1]}", "overwritten")
    again = shutil.copytree(store, tmp_path / "again")
    pairs = [(f"train{number}", "train") for number in range(6)]
    write_json(again / "splits.json", split_table(pairs, folds=2, seed=2))
    wrong = evaluation(again, tmp_path / "wrong", runs / "fold0" / "best.pth")
    assert_refused(run(capsys, *wrong, "--fold", "0"), "best.pth", "was trained on 2 cases")


def test_checkpoints_and_views_are_averaged(
    store: Path, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    both = [runs / f"fold{fold}" / "best.pth" for fold in (0, 1)]
    result = run(capsys, *evaluation(store, tmp_path, *both), "--tta", "flip")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert found["checkpoint"] == f"{both[0]}, {both[1]}, averaged"
    assert found["views"] == "flip: 4 averaged"
    twice = (both[0], both[0])  # the same again changes no answer
    assert run(capsys, *evaluation(store, tmp_path / "2", *twice)).code == 0
    assert run(capsys, *evaluation(store, tmp_path / "1", both[0])).code == 0
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8")) for name in "12"
    )
    assert one["counts"] == two["counts"]


def test_a_scan_is_predicted_by_an_ensemble(runs: Path, tmp_path: Path, capsys: Any) -> None:
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    scan = np.random.default_rng(0).integers(-200, 300, (32, 32, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(scan, affine), tmp_path / "ct.nii.gz")
    both = [runs / f"fold{fold}" / "best.pth" for fold in (0, 1)]
    result = run(
        capsys, "--predict", tmp_path / "ct.nii.gz", "--resume", *both, "--tta", "flip+rot",
        "--device", "cpu", "--amp", "off", "--box", 4, 4, 20, 20, "--slice", 1,
        "--output_dir", tmp_path / "out", "--probabilities",
    )  # fmt: skip
    assert result.code == 0, result.err
    label = nib.load(tmp_path / "out" / "ct_seg.nii.gz")
    assert label.shape == (32, 32, 3)
    facts = json.loads((tmp_path / "out" / "ct_seg.json").read_text(encoding="utf-8"))
    assert facts["views"] == "flip+rot: 8 averaged"
    chances = nib.load(tmp_path / "out" / "ct_probabilities.nii").get_fdata()
    np.testing.assert_allclose(chances.sum(axis=-1), 1, atol=1e-3)


def test_the_sweep_over_prompts_is_printed_and_saved(
    store: Path, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = evaluation(store, tmp_path, runs / "fold0" / "best.pth")
    result = run(capsys, *arguments, "--prompt_sweep")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert len(found["prompt_sweep"]) == 13
    exact = [one for one in found["prompt_sweep"] if one["prompt_jitter"] == "0"]
    assert exact[1]["dice"] == found["dice"]  # boxes, as the model was trained
    assert "off by up to 10% of the image's side" in result.out
    assert "off by up to 10%" in (tmp_path / "report" / "classes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--resume", "a.pth", "b.pth"], ["--resume names 2 checkpoints", "--eval and --predict"]),
        (["--spacing", "1", "1", "1"], ["--spacing needs --eval"]),
        (["--spacing", "1", "0", "1"], ["--spacing", "not a length in mm"]),
        (["--prompt_sweep"], ["--prompt_sweep needs --eval"]),
        (["--tta", "flip"], ["--tta needs --eval or --predict"]),
        (["--tta", "turn"], ["--tta", "flip+rot"]),
        (
            ["--merge", "a", "--eval", "--resume", "a.pth"],
            ["--merge and --eval cannot be combined"],
        ),
        (["--merge", "nowhere"], ["--merge: no nowhere/metrics.json"]),
        (["--fold", "-1"], ["--fold", "not a whole number"]),
        (["--model", "sam-med3d", "--fold", "1"], ["--fold is not for --model sam-med3d"]),
        (["--model", "sam-med3d", "--eval", "--prompt_sweep"], ["--prompt_sweep is not for"]),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(
    arguments: list[str], wanted: list[str], capsys: Any
) -> None:
    assert_refused(run(capsys, *arguments), *wanted)


def test_members_that_do_not_fit_are_refused(
    store: Path, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    larger = tmp_path / "larger"
    flags = [*SHORT, "--data_root", store, "--output_dir", larger, "--img_size", "48"]
    assert run(capsys, *flags).code == 0
    both = (runs / "fold0" / "best.pth", larger / "best.pth")
    result = run(capsys, *evaluation(store, tmp_path / "out", *both))
    assert_refused(result, "img_size 48", "img_size 32"[-2:], larger / "best.pth")
    shutil.rmtree(larger)
    assert_refused(run(capsys, *evaluation(store, tmp_path / "out", *both)), "no checkpoint at")
