"""Counted nouns in messages."""

from __future__ import annotations

import pytest

from dataset.text import counted


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
