"""The evidence table: every setting once, finished runs left alone, figures by hand."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import evidence
from benchmarks.evidence import RECIPES, SEEDS, Setting
from tests.conftest import ROOT
from usam.cli import parser


def write_run(output: Path, setting: Setting, dice: dict[str, float]) -> Path:
    folder = setting.folder(output)
    folder.mkdir(parents=True)
    scores = {"background": 0.99, **dice}
    mean = sum(dice.values()) / len(dice)
    (folder / "commands.json").write_text(evidence.told(setting), encoding="utf-8")
    (folder / "metrics.json").write_text(
        json.dumps({"dice": scores, "mean_dice": mean}), encoding="utf-8"
    )
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """All runs of the phantom: strong is 0.1 better in 2D, in 2.5D only by less than the spread."""
    for setting in evidence.settings(["phantom"]):
        value = 0.4 + 0.02 * (setting.seed - SEEDS[1])
        if setting.recipe == "strong":
            value += 0.1 if setting.input == "2d" else 0.01
        write_run(tmp_path, setting, {"organ": value, "tumour": value + 0.2})
    return tmp_path


def test_every_setting_is_run_once() -> None:
    found = list(evidence.settings(evidence.STAND_INS))
    assert len(found) == len(set(found)) == 24
    assert {setting.seed for setting in found[:8]} == {SEEDS[0]}


def test_the_table_holds_mean_and_spread_of_each_class_and_says_who_won(output: Path) -> None:
    lines = evidence.table(output, "phantom")
    rows = {line.split(" | ")[0].strip("| *"): line for line in lines if line.startswith("|")}
    # Seeds 0.02 apart: a standard deviation of 0.02.
    assert (
        "| 0.500 ± 0.020 | 0.600 ± 0.020 | 0.500 ± 0.020 | 0.510 ± 0.020 |"
        in rows["mean of classes"]
    )
    assert "| 0.400 ± 0.020 | 0.500 ± 0.020 |" in rows["organ"]
    assert "background" not in rows
    text = "\n".join(lines)
    assert "strong over published, 2d: +0.100, more than the spread over seeds (0.020)" in text
    assert "strong over published, 2.5d: +0.010, not more than the spread" in text
    assert "2.5d over 2d, strong: -0.090, not more" in text


def test_a_stand_in_without_all_its_runs_is_not_in_the_table(output: Path) -> None:
    (Setting("phantom", "2d", "strong", SEEDS[0]).folder(output) / "metrics.json").unlink()
    for name in evidence.STAND_INS:
        assert evidence.table(output, name) == [f"### {name}", "", "not run", ""]


def test_the_page_keeps_its_words_around_the_table(output: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"# Before\n\n{evidence.BEGIN}\nold\n{evidence.END}\n\nAfter\n", encoding="utf-8"
    )
    for _ in range(2):
        evidence.write_page(output, page)
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# Before\n\n{evidence.BEGIN}\n\n### phantom\n")
        assert text.endswith(f"{evidence.END}\n\nAfter\n")
        assert "old" not in text


def test_a_finished_run_is_not_run_again_unless_by_other_commands(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    setting = Setting("phantom", "2d", "strong", SEEDS[0])
    evidence.run(setting, output, "cpu", 1)
    monkeypatch.setattr(evidence, "COMMON", (*evidence.COMMON, "--warmup"))
    with pytest.raises(OSError, match="nowhere"):
        evidence.run(setting, output, "cpu", 1)
    folder = setting.folder(output)
    assert not (folder / "metrics.json").exists()
    assert (folder.with_name(f"{folder.name}.1") / "metrics.json").exists()
    assert evidence.scores_of(output, "phantom", "2d", "strong") is None


def test_without_label_maps_only_the_phantom_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert evidence.make_data(tmp_path, tmp_path / "missing") == ["phantom"]
    assert "anatomy: no folder" in capsys.readouterr().out
    assert evidence.make_data(tmp_path, None) == ["phantom"]


def test_its_commands_differ_only_in_what_is_compared(tmp_path: Path) -> None:
    parsed = {}
    for recipe in RECIPES:
        setting = Setting("anatomy", "2.5d", recipe, 7)
        training, evaluation = evidence.commands(setting, tmp_path)
        args = parser.parse_flags(training)
        parsed[recipe] = vars(args) | {"recipe": None, "output_dir": None}
        assert (args.recipe, args.input, args.seed) == (recipe, "2.5d", 7)
        assert parser.parse_flags(evaluation).eval
    assert parsed["published"] == parsed["strong"]


def test_every_command_of_reproduce_parses() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python u-sam\.py (.*)$|`python u-sam\.py (--[^`]*)`", text, re.M)
    assert len(commands) >= 12
    for words in commands:
        parser.parse_flags(shlex.split(words[0] or words[1]))
