"""Counted nouns, safe names and safe CSV cells."""

from __future__ import annotations

import pytest

from dataset.text import counted, csv_cell, printable


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "slice", "1 slice"), (2, "slice", "2 slices"), (0, "class", "0 classes"),
        (3, "process", "3 processes"), (1, "process", "1 process"), (2, "body", "2 bodies"),
        (2, "day", "2 days"), (12345, "voxel", "12,345 voxels"), (5, "patch", "5 patches"),
    ],
)  # fmt: skip
def test_numbers_and_nouns_agree(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_an_irregular_plural_is_given() -> None:
    assert counted(2, "axis", "axes") == "2 axes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("liver left", "liver left"), ("Läsion ✓", "Läsion ✓"), ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\r", "a\\nb\\r"), ("\x9b2J", "\\x9b2J"), ("fdp.\u202egnp", "fdp.\\u202egnp"),
        ("\udcff.nii", "\\udcff.nii"), ("zero\u200bwidth", "zero\\u200bwidth"), ("", ""),
    ],
)  # fmt: skip
def test_control_characters_do_not_reach_the_terminal(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_line_breaks_may_be_kept() -> None:
    assert printable("a\nb\tc\x07", keep="\n\t") == "a\nb\tc\\x07"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"), ("+liver", "'+liver"), ("-2", "'-2"), ("@sum", "'@sum"),
        ("\t=1", "\\t=1"), ("liver", "liver"), (-1.5, "-1.5"), (3, "3"), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_a_csv_cell_is_never_a_formula(value: object, cell: str) -> None:
    assert csv_cell(value) == cell
