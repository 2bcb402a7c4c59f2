"""What the parser answers: at once, in one line, with the closest real flag."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from usam.cli.parser import parse_flags

HEAVY = ("torch", "cv2", "numpy", "scipy", "matplotlib")


def refusal(words: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        parse_flags(words)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("u-sam.py: error: ")
    return line


@pytest.mark.parametrize(
    ("words", "closest"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--batch-size", "4"], "--batch_size"),
        (["--learning_rate_vit", "1"], "--lr_vit"),
        (["--outputdir=x"], "--output_dir"),
        (["-epochs", "3"], "--epochs"),
        (["--evel"], "--eval"),
        (["--class_weight", "1,2"], "--class_weights"),
    ],
)
def test_a_mistyped_flag_is_named_with_the_closest(
    words: list[str], closest: str, capsys: pytest.CaptureFixture
) -> None:
    line = refusal(words, capsys)
    assert f"{words[0]}: no such flag; did you mean {closest}?" in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--ep", "3"], ["--ep: no such flag"]),  # not an abbreviation of --epochs
        (["--zzzz"], ["--zzzz: no such flag (--help"]),
        (["train"], ["'train' is an unexpected argument"]),
        (["--patience", "3"], ["--patience", "removed"]),
        (["--local-rank=0"], ["torchrun", "--use_env"]),
        (["--val_fraction=--"], ["--val_fraction", "'--' is not a value"]),
        (["--epochs", "9" * 5000], ["--epochs", "a whole number from 1 to 1000000000"]),
        (["--epochs", "two"], ["--epochs", "'two' is not a whole number"]),
        (["--lr", "nan"], ["--lr", "'nan' is not a finite number of 0 or more"]),
        (["--val_fraction", "1"], ["--val_fraction", "0 or more, below 1"]),
        (["--num_workers", "1e20"], ["--num_workers", "from 0 to 512"]),
        (["--num_workers", "513"], ["--num_workers", "from 0 to 512"]),
        (["--output_dir", ""], ["--output_dir", "'' is not a path"]),
        (["--spacing", "1", "0", "1"], ["--spacing", "a length in mm"]),
        (["--dataset", "a\x1b[31mb"], ["--dataset", "\\x1b[31m"]),
        (["--dataset", "a" * 100_000], ["--dataset", " ... "]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture
) -> None:
    line = refusal(words, capsys)
    assert len(line) < 700
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--eval"], "--eval needs --resume PATH"),
        (["--predict", "a.nii", "--eval", "--resume", "b"], "--predict and --eval"),
        (["--val_fraction", "0", "--fold", "0"], "both choose the validation cases"),
        (["--resume", "auto", "--eval"], "not auto"),
        (["--resume", "a", "b"], "names 2 checkpoints"),
        (["--resume", "a", "auto", "--eval"], "--resume auto is one checkpoint"),
        (["--merge", "a", "--resume", "b"], "--merge and --resume"),
        (["--tta", "flip"], "--tta needs --eval or --predict"),
        (["--spacing", "1", "1", "1"], "--spacing needs --eval"),
        (["--channel", "0"], "--channel needs --predict"),
        (["--init", "a", "--resume", "b"], "--init and --resume"),
        (["--export_lora", "a"], "--export_lora needs --resume"),
        (["--export_weights", "a"], "--export_weights needs --resume"),
        (["--export_weights", "a", "--resume", "b", "--eval"], "--export_weights only writes"),
        (["--predict", "a", "--resume", "b", "--point", "1", "2"], "x y z label"),
        (["--predict", "a", "--resume", "b", "--point", "1", "2", "3", "2"], "label must be"),
        (["--predict", "a", "--resume", "b", "--slice", "1"], "give one per box"),
        (["--predict", "a", "--resume", "b", "--mm"], "--mm needs --point"),
        (["--predict", "a", "--resume", "b", "--prompts", "c", "--mm"], "--prompts and --mm"),
        (["--img_size", "100"], "a multiple of 16"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert expected in refusal(words, capsys)


def test_negative_numbers_may_have_an_exponent() -> None:
    words = ["--predict", "a", "--resume", "b", "--point", "-1e1", "-2.5e-1", "3"]
    assert parse_flags(words).point == [[-10, -0.25, 3]]


def test_many_workers_are_warned_of_and_too_many_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    parse_flags(["--num_workers", "8"])
    assert capsys.readouterr().err == ""
    parse_flags(["--num_workers", "9"])
    assert "warning: 9 DataLoader workers on 2 CPU cores" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # the published launch runs on any machine
    assert parse_flags(["--num_workers", "4"]).num_workers == 4
    assert "warning: 32 DataLoader workers" in capsys.readouterr().err
    assert "520 workers, at most 512" in refusal(["--num_workers", "65"], capsys)


def seconds(*command: str) -> float:
    """The fastest of five runs."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, timeout=60)
        taken.append(time.perf_counter() - started)
    return min(taken)


@pytest.mark.parametrize("words", [["--help"], ["--epoch", "3"]])
def test_help_and_mistyped_flags_answer_at_once_without_torch(words: list[str]) -> None:
    code = (
        "import sys, runpy; sys.argv = ['u-sam.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('u-sam.py', run_name='__main__')\n"
        f"finally: print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stderr.splitlines()[-1] == "[]"
    assert seconds("u-sam.py", *words) <= 2 * seconds("-c", "import numpy") + 0.2
