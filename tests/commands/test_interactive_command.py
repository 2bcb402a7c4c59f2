"""SAM-Med3D through u-sam.py: training, resuming, evaluation and prediction."""

from __future__ import annotations

import importlib.util
import json
import threading
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset.phantom import belly as phantom3d
from tests.conftest import ROOT
from tests.helpers.described import assert_described
from usam.cli import parser
from usam.models.sam_med3d import SamMed3d, build_sam_med3d
from usam.training import engine


@pytest.fixture(scope="module")
def usam_py() -> ModuleType:
    """u-sam.py as a module."""
    spec = importlib.util.spec_from_file_location("u_sam", ROOT / "u-sam.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small volumes."""
    folder = tmp_path_factory.mktemp("volumes") / "store"
    return phantom3d.build(folder, train_cases=4, val_cases=1, test_cases=1)


def run(usam_py: ModuleType, *words: object) -> None:
    usam_py.main(parser.parse_flags(["--device", "cpu", "--amp", "off", *map(str, words)]))


def training_words(store: Path, folder: Path) -> list[object]:
    return [
        "--model", "sam-med3d", "--sam_model", "vit_tiny", "--rel_pos", "corrected",
        "--dataset", "volumes", "--data_root", store, "--classes", "liver", "--num_workers", 0,
        "--batch_size", 1, "--accumulation_steps", 3, "--rounds", 2, "--epochs", 2,
        "--output_dir", folder,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(usam_py: ModuleType, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(usam_py, *training_words(store, folder))
    return folder


def test_a_run_records_its_choices(whole: Path) -> None:
    saved = torch.load(whole / "best.pth", weights_only=True)
    assert saved["args"]["model"] == "sam-med3d"
    wanted = {
        "rel_pos": "corrected", "num_point_embeddings": 2, "orientation": "RAS", "spacing": 1.5,
        "img_size": 64, "clicks": "accumulate", "threshold": 0.0, "prompt_mode": "clicks",
    }  # fmt: skip
    assert {name: saved["data"][name] for name in wanted} == wanted
    lines = [
        json.loads(line) for line in (whole / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert set(lines[0]["val"]["dice"]) == {"1 click", "3 clicks", "5 clicks", "10 clicks"}


def test_a_killed_run_resumes_to_the_same_end(
    usam_py: ModuleType, store: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    train_one_epoch = engine.train_one_epoch

    def killed(*args: Any, **how: Any) -> Any:
        if args[2].progress.epoch == 1:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **how)

    words = training_words(store, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "train_one_epoch", killed)
        run(usam_py, *words)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=60)
    run(usam_py, *words, "--resume", tmp_path / "last.pth")
    found, wanted = (
        torch.load(folder / "last.pth", weights_only=True) for folder in (tmp_path, whole)
    )
    assert found["progress"] == wanted["progress"] and found["best"] == wanted["best"]
    for name, value in wanted["model"].items():
        assert torch.equal(found["model"][name], value), name
    lines = [(folder / "log.jsonl").read_text(encoding="utf-8") for folder in (tmp_path, whole)]
    assert lines[0] == lines[1]


def test_evaluation_leaves_scores_and_curves(
    usam_py: ModuleType, store: Path, whole: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("usam.prediction.windows.MAX_WINDOWS", 2)
    run(
        usam_py, "--eval", "--resume", whole / "best.pth", "--dataset", "volumes", "--data_root",
        store, "--classes", "aorta", "--output_dir", tmp_path,
    )  # fmt: skip
    scores = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert scores["objects"] == 1 and list(scores["classes"]) == ["aorta"]
    assert len((tmp_path / "clicks.csv").read_text(encoding="utf-8").splitlines()) == 5
    assert "10 clicks" in capsys.readouterr().out and (tmp_path / "clicks.png").exists()
    assert_described(tmp_path)
    run(
        usam_py, "--eval", "--resume", whole / "best.pth", "--dataset", "volumes", "--data_root",
        store, "--classes", "aorta", "--clicks", "challenge", "--output_dir", tmp_path,
    )  # fmt: skip
    (one,) = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["by_object"]
    assert not one["failed"] and one["seconds"] > 0 and len(one["dice"]) == 5
    assert len((tmp_path / "clicks.csv").read_text(encoding="utf-8").splitlines()) == 6
    assert "over 90 s" in capsys.readouterr().out


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A small scan, stored in LAS with odd voxels."""
    image = np.random.default_rng(0).normal(50, 20, (20, 24, 15)).astype(np.int16)
    affine = np.diag([-2.0, 2.5, 3.0, 1])
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_prediction_keeps_the_scans_geometry(
    usam_py: ModuleType, whole: Path, scan: Path, tmp_path: Path, monkeypatch
) -> None:
    """Every window answers with its clicks' own half, so the place of the clicks shows."""

    def decode(self, embedding, points=None, mask=None, *, boxes=None):
        answer = torch.full((1, 1, 16, 16, 16), -5.0)
        if points is not None:
            x, y, z = (points[0][0, 0] / 4).long().tolist()
            answer[..., max(x - 1, 0) : x + 2, max(y - 1, 0) : y + 2, max(z - 1, 0) : z + 2] = 5
        return answer

    monkeypatch.setattr(SamMed3d, "decode", decode)
    prompts = {"objects": [
        {"name": "one", "label": 4, "points": [[3, 4, 5]]},
        {"name": "two", "label": 9, "points": [[15, 18, 9]]},
    ]}  # fmt: skip
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    words = ["--predict", scan, "--resume", whole / "best.pth", "--output_dir", tmp_path]
    run(usam_py, *words, "--prompts", tmp_path / "prompts.json", "--overlay")
    assert (tmp_path / "scan_overlay.png").exists()
    found, given = nib.load(tmp_path / "scan_seg.nii.gz"), nib.load(scan)
    label = np.asarray(found.dataobj)
    assert label.shape == given.shape and label.dtype == np.uint8
    np.testing.assert_array_equal(found.affine, given.affine)
    assert label[3, 4, 5] == 4 and label[15, 18, 9] == 9 and label[3, 18, 5] == 0
    rows = json.loads((tmp_path / "scan_seg.json").read_text(encoding="utf-8"))["objects"]
    assert [row["name"] for row in rows] == ["one", "two"]
    voxels = int((label == 4).sum())
    assert rows[0]["voxels"] == voxels
    assert rows[0]["volume_ml"] == pytest.approx(voxels * 2 * 2.5 * 3 / 1000, abs=1e-3)


def test_published_weights_predict_without_a_checkpoint_of_ours(
    usam_py: ModuleType, scan: Path, tmp_path: Path, capsys
) -> None:
    model = build_sam_med3d("vit_tiny", num_point_embeddings=4)
    wrapper = {"model_state_dict": model.state_dict(), "args": Namespace(lr=1)}
    torch.save(wrapper, tmp_path / "turbo.pth")
    words = ["--model", "sam-med3d", "--sam_model", "vit_tiny", "--predict", scan]
    words += ["--sam_weight", tmp_path / "turbo.pth", "--output_dir", tmp_path]
    run(usam_py, *words, "--box", -10, 10, 6, -20, 30, 30, "--mm")
    assert "0 points, 1 window" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "scan_seg.json").read_text(encoding="utf-8"))["objects"]
    assert row["box"] == "given to the model"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--point", 20, 1, 1], "click 20 1 1 lies outside"),
        (["--point", 500, 1, 1, "--mm"], "click 500 1 1 mm lies outside"),
        ([], "object has no prompt"),
        (["--point", 1, 1, 1, 0], "only points outside it"),
        (["--box", 1, 2, 3, 4], "--box: expected 6 numbers"),
        (["--prompts", "none.json"], "none.json: no such prompts file"),
        (["--point", 1, 1, 1, "--window", "liver"], "--window is not for --model sam-med3d"),
        (["--point", 1, 1, 1, "--init_mask", "none.nii.gz"], "none.nii.gz"),
        (["--point", 1, 1, 1, "--sam_model", "vit_b"], "was trained with vit_tiny"),
    ],
)
def test_bad_predictions_end_in_one_line(
    usam_py: ModuleType, whole: Path, scan: Path, tmp_path: Path, words: list, text: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=text) as caught:
        run(
            usam_py, "--predict", scan, "--resume", whole / "best.pth", "--output_dir", tmp_path,
            *words,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lr_backbone", 1], "--lr_backbone is not for --model sam-med3d"),
        (["--dataset", "rectum"], "--dataset rectum is for --model u-sam; --model sam-med3d"),
        (["--sam_weight", "none.pth"], "none.pth: no such SAM-Med3D checkpoint.*huggingface"),
        (["--eval", "--sam_weight", "none"], "needs trained weights"),
        (["--sam_model", "vit_tiny", "--dataset", "volumes"], "--data_root must name"),
        (["--sam_model", "vit_x"], None),
    ],
)
def test_bad_runs_end_in_one_line(usam_py: ModuleType, words: list, text: str | None) -> None:
    with pytest.raises((ValueError, FileNotFoundError, SystemExit), match=text):
        run(usam_py, "--model", "sam-med3d", *words)


def test_an_unknown_class_is_named(usam_py: ModuleType, store: Path, tmp_path: Path) -> None:
    words = training_words(store, tmp_path)
    words[words.index("liver")] = "heart"
    with pytest.raises(ValueError, match="'heart'.*liver"):
        run(usam_py, *words)


def test_flags_of_volumes_are_not_for_slices(usam_py: ModuleType) -> None:
    for words in (["--rounds", 3], ["--no_flips"], ["--classes", "a"], ["--dataset", "phantom3d"]):
        with pytest.raises(
            ValueError, match=f"{words[0]}.* (is not for --model u-sam|is for --model sam-med3d)"
        ):
            run(usam_py, *words)


def test_defaults_are_the_published_recipe(usam_py: ModuleType) -> None:
    args = parser.parse_flags(["--model", "sam-med3d"])
    parser.fill_defaults(args, None)
    assert (args.epochs, args.batch_size, args.accumulation_steps, args.rounds) == (200, 12, 20, 11)
    assert (args.lr_vit, args.lr, args.weight_decay) == (8e-4, 8e-5, 0.1)
    assert args.sam_model == "vit_b_ori" and args.rel_pos == "published"
