"""Pictures of segmentations and what an evaluation writes: colours, orientation, files."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from usam.evaluation import report, slices
from usam.evaluation.metrics import ClassCounts
from usam.runtime import figures as visualize
from usam.runtime.figures import OPACITY, blend, save_overlay

CLASSES = ["background", "normal rectum", "tumour"]
COLORS = ["#000000", "#00ff00", "#ff0000"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure made from here on."""
    made: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: object, **how: object) -> None:
            super().__init__(*args, **how)
            made.append(self)

    monkeypatch.setattr(visualize, "Figure", Kept)
    return made


def test_labels_tint_the_image_within_an_outline_and_background_stays_gray() -> None:
    image = np.array([[0, 102, 255]], np.uint8).repeat(3, axis=1).repeat(3, axis=0)
    mask = np.array([[0, 1, 2]]).repeat(3, axis=1).repeat(3, axis=0)  # three columns each
    picture = blend(image, mask, COLORS)
    left = 1 - OPACITY
    tinted = [[0.4 * left, 0.4 * left + OPACITY, 0.4 * left], [1, left, left]]
    green, red = [0, 1, 0], [1, 0, 0]
    wanted = [*3 * [[0, 0, 0]], green, tinted[0], green, red, *2 * [tinted[1]]]
    np.testing.assert_allclose(picture[1], wanted, atol=1e-6)
    same = blend(image.astype(np.float32) / 255, mask, COLORS)
    np.testing.assert_allclose(same, picture, atol=1e-6)


def test_an_overlay_shows_image_prompts_truth_and_prediction(
    tmp_path: Path, figures: list[Figure]
) -> None:
    image, mask = np.full((20, 30), 100, np.uint8), np.zeros((20, 30), int)
    mask[4:8, 10:20] = 2
    points = (np.array([[11.0, 5.0], [0.0, 0.0]]), np.array([1, -1]))
    path = tmp_path / "a.png"
    save_overlay(
        path, image, {"truth": mask, "prediction": mask * 0}, classes=CLASSES, colors=COLORS,
        title="a", points=points, box=np.array([10.0, 4.0, 20.0, 8.0]),
    )  # fmt: skip
    height, width, _ = cv2.imread(str(path)).shape
    assert width > 2 * height
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["image", "truth", "prediction"]
    assert axes[0].lines[0].get_xydata().tolist() == [[11, 5]]  # -1 is not a point
    (box,) = axes[0].patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (10, 4, 10, 4)
    assert axes[1].images[0].get_array().shape == (20, 30, 3)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == CLASSES[1:]


def test_data_stored_on_its_side_is_turned_upright_with_its_prompts(
    tmp_path: Path, figures: list[Figure]
) -> None:
    mask = np.zeros((20, 30), int)
    mask[4:8, 10:20] = 1
    save_overlay(
        tmp_path / "a.png", np.zeros((20, 30), np.uint8), {"truth": mask}, classes=CLASSES,
        colors=COLORS, points=(np.array([[11.0, 5.0]]), np.array([1])),
        box=np.array([10.0, 4.0, 20.0, 8.0]), transpose=True,
    )  # fmt: skip
    axes = figures[0].axes
    shown = axes[1].images[0].get_array()
    assert shown.shape == (30, 20, 3)
    assert shown[12, 5, 1] > 0
    assert axes[0].lines[0].get_xydata().tolist() == [[5, 11]]
    (box,) = axes[0].patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (4, 10, 4, 10)


def test_many_classes_name_only_those_in_the_picture(tmp_path: Path, figures: list[Figure]) -> None:
    names = [f"organ {number}" for number in range(17)]
    mask = np.zeros((8, 8), int)
    mask[2:4, 2:4] = 5
    save_overlay(
        tmp_path / "a.png", np.zeros((8, 8), np.uint8), {"truth": mask, "prediction": mask * 0},
        classes=names, colors=["#123456"] * 17,
    )  # fmt: skip
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["organ 5"]


def test_names_are_text_and_stay_in_the_folder(tmp_path: Path) -> None:
    """Names come from an index that anyone may have written."""
    name = "../a$b^$c"
    batch = {"image": torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "id": [name]}
    shown = [(batch, torch.zeros(1, 8, 8, dtype=torch.long), {}, torch.zeros(1, 3, 8, 8))]
    (path,) = slices.draw_overlays(
        tmp_path / "overlays", shown, classes=CLASSES, colors=COLORS, transpose=False
    )
    assert path.parent == tmp_path / "overlays"
    assert [file.name for file in tmp_path.rglob("*.png")] == [path.name]


def test_scores_are_printed_and_saved_with_what_they_are_of(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    truth = torch.zeros(2, 4, 4, dtype=torch.long)
    truth[0, :2] = 1
    prediction = truth.clone()
    prediction[0, 0] = 0
    prediction[1, 0, 0] = 1  # wrong, on a slice that the published protocol leaves out
    counts = ClassCounts(3)
    counts.update(prediction, truth)
    facts = {
        "checkpoint": "best.pth", "dataset": "phantom", "split": "test", "slices": 6, "cases": 2,
        "prompts": "none",
    }  # fmt: skip
    path = report.write_scores(tmp_path / "new", counts, CLASSES, facts)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert {name: saved[name] for name in facts} == facts
    assert saved["dice"]["normal rectum"] == 2 * 4 / (8 + 5)
    assert saved["foreground_slices_only"]["dice"]["normal rectum"] == 2 * 4 / (8 + 4)
    printed = capsys.readouterr().out
    assert "best.pth on 6 test slices of 2 cases of phantom; prompts: none" in printed
    assert "normal rectum            0.6154  0.4444" in printed
    assert "slices with foreground only (the published protocol): mean Dice 0.6667" in printed
    assert "left out of the means: tumour" in printed
