"""The challenge's protocol by hand: which voxel is clicked, areas, clicks needed, time limit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from usam.evaluation import challenge
from usam.evaluation.challenge import area, clicks_needed, error_click, score_clicks
from usam.evaluation.click_report import Item

MM = 3 * (1.5,)


def drawn(*blocks: tuple[slice, slice, slice], shape=(16, 16, 24)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for block in blocks:
        mask[block] = True
    return mask


def test_a_click_is_deepest_in_the_largest_error() -> None:
    nothing, cube = drawn(), np.s_[2:7, 2:7, 2:7]
    assert error_click(drawn(cube), drawn(cube), MM) is None
    assert error_click(nothing, drawn(cube, np.s_[12, 12, 12]), MM) == (4, 4, 4)
    # 27 added voxels, 1 missed one, both away from what is right
    found, truth = drawn(cube, np.s_[9:12, 9:12, 9:12]), drawn(cube, np.s_[2, 2, 14])
    assert error_click(found, truth, MM) == (10, 10, 10)
    # the knob at the end of a bar, where the bar's own middle is only one voxel deep
    assert error_click(nothing, drawn(np.s_[5, 5, 0:20], np.s_[4:7, 4:7, 20:23]), MM) == (5, 5, 21)
    # a bar of 24 voxels is larger than a block of 18, though less deep; of equal depths the first
    bar, block = np.s_[1, 1, 0:24], np.s_[8:10, 8:11, 8:11]
    assert error_click(nothing, drawn(bar, block), MM) == (1, 1, 0)
    # missed and added voxels that touch at a corner are one error: 4 against 3
    found, truth = drawn(np.s_[6, 6, 6:8]), drawn(np.s_[5, 5, 4:6], np.s_[0, 0, 0:3])
    assert error_click(found, truth, MM) == (5, 5, 4)
    # of equal errors the first in row-major order
    truth = drawn(np.s_[9, 0, 0], np.s_[3, 9, 9], np.s_[3, 9, 12])
    assert error_click(nothing, truth, MM) == (3, 9, 9)
    assert error_click(nothing, np.asfortranarray(truth), MM) == (3, 9, 9)
    # beyond the volume counts as outside
    whole = np.ones((3, 5, 3), bool)
    assert error_click(~whole, whole, MM) == (1, 1, 1)


def test_depth_is_in_millimetres() -> None:
    """A plate is 3 mm deep along x and y, the block beside it 6 and 2 mm; in voxels 1 and 2."""
    truth = drawn(np.s_[4, 2:7, 2:7], np.s_[5:8, 2:5, 7:10])
    assert error_click(truth & False, truth, (3.0, 1.0, 1.0)) == (4, 4, 4)
    assert error_click(truth & False, truth, (1.0, 1.0, 1.0)) == (6, 3, 8)


def test_each_click_is_scored_and_only_answers_are_timed(monkeypatch) -> None:
    cube = np.s_[4:8, 4:8, 4:8]
    truth, clock, clicks = drawn(cube), [0.0], []
    answers = [
        drawn(np.s_[4, 4:6, 4:7]),  # 6 of 64 voxels: Dice 12 / 70, at most 0.2
        drawn(np.s_[5:9, 4:8, 4:8]),  # one voxel, 1.5 mm, aside: Dice 2 * 48 / 128
        truth,
    ]

    def answer(voxel, label):
        clicks.append((voxel, label))
        clock[0] += 7
        return answers[len(clicks) - 1]

    monkeypatch.setattr(challenge.time, "perf_counter", lambda: clock[0])
    scores = score_clicks(answer, truth, MM)
    np.testing.assert_allclose(scores[:, 0], [12 / 70, 0.75, 1, 1, 1])
    np.testing.assert_allclose(scores[:, 1], [0, 1, 1, 1, 1])
    assert scores[:, 2].tolist() == [7, 7, 7, 0, 0]
    # deepest: (5, 5, 5) of the cube; then (6, 5, 5), two voxels from outside and from what was
    # found; then the added and the missed plate, 16 voxels each, of which the missed comes first
    assert clicks == [((5, 5, 5), 1), ((6, 5, 5), 1), ((4, 4, 4), 1)]
    with pytest.raises(ValueError, match="no voxel"):
        score_clicks(answer, truth & False, MM)


def test_measures_by_hand(tmp_path: Path) -> None:
    rising = np.array([0, 0.5, 0.8, 0.9, 0.85])
    assert area(rising) == pytest.approx(0.25 + 0.65 + 0.85 + 0.875)
    assert area(np.ones((2, 5))).tolist() == [4, 4]
    assert [clicks_needed(rising, level) for level in (0, 0.8, 0.85, 0.91)] == [1, 3, 4, None]
    items = [Item(0, "a", 1, "tube"), Item(0, "a", 2, "ball"), Item(1, "b", 1, "tube")]
    scores = np.zeros((3, 5, 3))
    scores[0] = np.stack([rising, rising / 2, np.full(5, 18)], axis=1)  # 90 s: at the limit
    scores[1] = np.stack([np.full(5, 0.1), np.zeros(5), np.full(5, 20)], axis=1)  # 100 s: over it
    facts = {"clicks": "challenge"}
    summary = challenge.write_report(tmp_path, items, scores, failed=items[2:], facts=facts)
    row = summary["all"]
    assert row["objects"] == 3 and row["over_limit"] == 1
    assert row["seconds"] == {"mean": 95, "max": 100}  # of the two that did not fail
    assert row["clicks_needed"]["0.80"] == {"mean": (3 + 5 + 5) / 3, "never": 2 / 3}
    assert row["clicks_needed"]["0.85"]["mean"] == (4 + 5 + 5) / 3
    assert row["auc"]["dice"]["mean"] == pytest.approx((2.625 + 0.4 + 0) / 3)
    assert row["final"]["nsd"]["mean"] == pytest.approx(0.425 / 3)
    assert row["dice"]["3 clicks"]["mean"] == pytest.approx(0.3)
    assert summary["classes"]["ball"]["clicks_needed"]["0.90"] == {"mean": 5, "never": 1}
    first, _, last = summary["by_object"]
    assert first["clicks_needed"] == {"0.80": 3, "0.85": 4, "0.90": 4}
    assert not first["over_limit"] and first["seconds"] == 90
    assert last["failed"] and last["seconds"] is None and not last["over_limit"]
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == summary
    assert len((tmp_path / "clicks.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3 * 5
    text = challenge.format_clicks(summary)
    assert "over 90 s" in text and "failed, counted as 0: b: tube" in text
    assert ["all", "95.00", "100.00", "1", "4.33", "(67%)"] in [
        line.split()[:6] for line in text.splitlines()
    ]
    failed = challenge.write_report(tmp_path, items[2:], scores[2:], failed=items[2:], facts=facts)
    assert failed["all"]["seconds"] is None and challenge.format_clicks(failed)


def test_the_page_describes_every_key(tmp_path: Path) -> None:
    item = Item(0, "a", 1, "tube")
    scores = np.full((1, 5, 3), 0.5)
    summary = challenge.write_report(tmp_path, [item], scores, failed=[], facts={})
    page = (ROOT / "docs" / "sam-med3d.md").read_text(encoding="utf-8")
    keys = {*summary, *summary["protocol"], *summary["all"], *summary["by_object"][0]}
    for key in keys:
        assert f"`{key}`" in page, key
