"""Scores over prompts: every mode and jitter, the same however slices are shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.toy import FLOAT32, SIDE, Slices, Toy
from usam.evaluation.metrics import ClassCounts
from usam.evaluation.pixels import count_pixels
from usam.evaluation.prompt_sweep import (
    JITTERS,
    Swept,
    move_prompts,
    sweep_facts,
    sweep_prompts,
    sweep_table,
)
from usam.models.prompts import prompts_from_masks

CLASSES = ["background", "organ", "tumour"]


def swept(batch_size: int) -> list[Swept]:
    torch.manual_seed(0)
    loader = DataLoader(Slices(10), batch_size=batch_size)
    return sweep_prompts(Toy(), loader, img_size=SIDE, seed=3, precision=FLOAT32)


def test_every_mode_and_jitter_is_tried_and_named() -> None:
    found = swept(4)
    assert [(one.mode, one.jitter) for one in found] == [
        (0, "0"), *((mode, jitter) for mode in (1, 2, 3) for jitter in JITTERS)
    ]  # fmt: skip
    head, rows = sweep_table(found, CLASSES)
    assert len(head) == len(rows[0]) == 5
    assert [row[0] for row in rows[:3]] == [
        "none",
        "boxes around the true masks",
        "boxes around the true masks, off by up to 2% of the image's side",
    ]
    assert rows[0][1] == f"{found[0].counts.summary(CLASSES)['dice']['organ']:.4f}"
    facts = sweep_facts(found, CLASSES)
    assert facts[4]["prompts"].startswith("boxes") and facts[4]["prompt_jitter"] == "10%"
    assert facts[4]["dice"] == found[4].counts.summary(CLASSES)["dice"]


def test_exact_prompts_score_as_the_plain_evaluation_does() -> None:
    torch.manual_seed(0)
    model, loader = Toy(), DataLoader(Slices(10), batch_size=4)
    found = {(one.mode, one.jitter): one.counts.tensors for one in swept(4)}
    for mode in range(4):
        counts = count_pixels(model, loader, prompt_mode=mode, precision=FLOAT32)
        assert torch.equal(found[mode, "0"], counts.tensors)


def test_jitter_depends_on_the_slice_alone() -> None:
    mask = torch.zeros(4, 64, 64, dtype=torch.long)
    mask[:, 20:40, 10:30], mask[:, 45:50, 45:60] = 1, 2
    names = ["a", "b", "c", "d"]

    def moved(chosen: slice, pixels: float = 6.4) -> dict[str, Any]:
        prompts = prompts_from_masks(mask[chosen], 3, 3)
        batch = {"id": names[chosen]}
        return move_prompts(prompts, batch, pixels=pixels, img_size=64, seed=1)

    together, alone = moved(slice(0, 4)), moved(slice(2, 3))
    assert torch.equal(together["boxes"][2:3], alone["boxes"])
    assert torch.equal(together["points"][0][2:3], alone["points"][0])
    exact = prompts_from_masks(mask, 3, 3)
    assert 0 < (together["boxes"] - exact["boxes"]).abs().max() <= 6.4
    assert not torch.equal(together["boxes"][0], together["boxes"][1])
    assert torch.equal(together["points"][1], exact["points"][1])


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_prompts_a_mode_has_not_stay_none(mode: int) -> None:
    prompts = prompts_from_masks(torch.ones(2, 16, 16, dtype=torch.long), 2, mode)
    found = move_prompts(prompts, {"id": ["a", "b"]}, pixels=2, img_size=16, seed=0)
    assert {name: value is None for name, value in found.items()} == {
        name: value is None for name, value in prompts.items()
    }


def test_a_class_that_is_nowhere_has_a_dash() -> None:
    counts = ClassCounts(3)
    counts.update(torch.ones(1, 4, 4, dtype=torch.long), torch.ones(1, 4, 4, dtype=torch.long))
    _, ((_, organ, tumour, *_),) = sweep_table([Swept(0, "0", counts)], CLASSES)
    assert (organ, tumour) == ("1.0000", "-")
