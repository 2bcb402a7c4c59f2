"""A checkpoint against the data it is evaluated on: cases it has seen, classes, preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from usam.evaluation.checks import (
    check_held_out,
    check_preparation,
    small_tolerances,
    used_cases,
)

INFO = {
    "classes": ["background", "organ"], "window": [-160, 240], "orientation": "LPS",
    "spacing": None, "clahe": False, "crop": 0.0, "body_crop": False,
}  # fmt: skip
PATH = Path("best.pth")


def checkpoint(**data: Any) -> dict[str, Any]:
    return {"data": INFO | data}


def record(trained_on: str, chosen_by: str) -> dict[str, Any]:
    """A record of cases whose digests are their letters, under other names than now."""
    return used_cases(
        {f"old {digest}": digest for digest in trained_on},
        {f"old {digest}": digest for digest in chosen_by},
    )


def test_a_case_that_was_trained_on_is_refused_whatever_its_name() -> None:
    saved = [(PATH, checkpoint(cases=record("abc", "d")))]
    with pytest.raises(ValueError, match=r"best.pth was trained on 1 case .*: case7; .*--override"):
        check_held_out(saved, {"case7": "c", "case8": "x"}, override=False)
    used, lines = check_held_out(saved, {"case7": "c", "case8": "d"}, override=True)
    assert used == {"trained_on": ["case7"], "chosen_by": ["case8"]}
    assert lines == [
        "overridden: trained on 1 of 2 cases: case7",
        "best epoch chosen by 1 of 2 cases: case8",
    ]


def test_cases_that_only_chose_the_best_epoch_are_scored_and_named() -> None:
    saved = [(PATH, checkpoint(cases=record("abc", "de")))]
    used, lines = check_held_out(saved, {"one": "d", "two": "e", "three": "x"}, override=False)
    assert used == {"trained_on": [], "chosen_by": ["one", "two"]}
    assert lines == ["best epoch chosen by 2 of 3 cases: one, two"]
    used, lines = check_held_out(saved, {"three": "x"}, override=False)
    assert lines == ["no case was trained on or used to choose the best epoch"]


def test_a_checkpoint_without_a_record_says_unknown() -> None:
    both = [(PATH, checkpoint(cases=record("a", ""))), (Path("old.pth"), checkpoint())]
    used, lines = check_held_out(both, {"one": "x"}, override=False)
    assert used == {"trained_on": None, "chosen_by": None}
    assert lines == [
        "unknown whether the cases were trained on: old.pth has no record of its training cases"
    ]


def test_each_of_several_checkpoints_is_checked() -> None:
    both = [
        (PATH, checkpoint(cases=record("a", ""))),
        (Path("two.pth"), checkpoint(cases=record("b", ""))),
    ]
    with pytest.raises(ValueError, match=r"^two\.pth was trained on 1 case"):
        check_held_out(both, {"one": "b"}, override=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["background", "bowel"]), ("window", [-100, 300]), ("orientation", "stored"),
        ("spacing", 1.5), ("clahe", True), ("crop", 0.1), ("body_crop", True),
    ],
)  # fmt: skip
def test_differing_preparation_is_refused_or_named(key: str, value: Any) -> None:
    saved = [(PATH, checkpoint(**{key: value}))]
    assert check_preparation([(PATH, checkpoint())], INFO, override=False) == []
    with pytest.raises(ValueError, match=rf"best.pth was .* other data: {key} .*--override"):
        check_preparation(saved, INFO, override=False)
    (line,) = check_preparation(saved, INFO, override=True)
    assert line == (
        f"overridden: data differ from those of best.pth: {key} {INFO[key]} (checkpoint: {value})"
    )


def test_another_number_of_classes_is_refused_in_any_case() -> None:
    saved = [(PATH, checkpoint(classes=["background", "organ", "tumour"]))]
    with pytest.raises(ValueError, match="trained on 3 classes, the data set has 2"):
        check_preparation(saved, INFO, override=True)


def test_what_a_checkpoint_does_not_hold_is_not_compared() -> None:
    old = {"data": {"classes": INFO["classes"]}}
    assert check_preparation([(PATH, old)], INFO, override=False) == []


def test_tolerances_below_the_voxel_size_are_named() -> None:
    (line,) = small_tolerances([(1.5, 0.7, 0.7), (1.2, 0.9, 0.9)])
    assert line.startswith("NSD at 1 mm: the tolerance is below the voxel size (up to 1.5 mm)")
    assert len(small_tolerances([(5.0, 0.7, 0.7)])) == 2
    assert small_tolerances([(1.0, 0.7, 0.7)]) == []
