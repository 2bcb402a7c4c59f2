"""Averages over views and models: prompts turn with the image, equal models change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.toy import SIDE, Toy
from usam.models.ensemble import VIEWS, Averaged, turned, turned_back, turned_prompts
from usam.models.prompts import boxes_from_masks
from usam.weights.folds import check_start
from usam.weights.inference import check_members


class Marked(nn.Module):
    """Class 1 where a given point or box is, nothing of the image: shows where prompts end up."""

    num_classes = 2

    def __init__(self, row_col: bool = False) -> None:
        super().__init__()
        self.row_col = row_col

    def forward(self, image: Tensor, points: Any = None, boxes: Any = None) -> Tensor:
        found = torch.zeros(len(image), 2, *image.shape[-2:])
        for n in range(len(image)):
            if points is not None:
                x, y = points[0][n, 0].long().flip(0 if self.row_col else ()).tolist()
                found[n, 1, y, x] = 30
            if boxes is not None:
                x1, y1, x2, y2 = boxes[n].long().tolist()
                found[n, 1, y1 : y2 + 1, x1 : x2 + 1] = 30
        return found


def test_views_are_all_different_and_lead_back() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    for name, number in (("none", 1), ("flip", 4), ("flip+rot", 8)):
        seen = {tuple(turned(image, view).flatten().tolist()) for view in VIEWS[name]}
        assert len(seen) == number
        for view in VIEWS[name]:
            assert torch.equal(turned_back(turned(image, view), view), image)


@pytest.mark.parametrize("view", VIEWS["flip+rot"])
def test_prompts_turn_with_the_image(view: tuple[int, bool]) -> None:
    mask = torch.zeros(1, 10, 10, dtype=torch.long)
    mask[0, 2:5, 4:9] = 1
    image = torch.zeros(1, 1, 10, 10)
    image[0, 0, 3, 7] = 1
    points = (torch.tensor([[[7.0, 3.0]]]), torch.ones(1, 1))
    given = turned_prompts(points, boxes_from_masks(mask, margin=0), view, 10)
    x, y = given["points"][0][0, 0].long().tolist()
    assert turned(image, view)[0, 0, y, x] == 1
    wanted = boxes_from_masks(turned(mask[:, None], view)[:, 0], margin=0)
    assert torch.equal(given["boxes"], wanted)


@pytest.mark.parametrize("tta", ["flip", "flip+rot"])
def test_an_answer_to_prompts_is_the_same_from_all_sides(tta: str) -> None:
    points = (torch.tensor([[[6.0, 1.0]]]), torch.ones(1, 1))
    boxes = torch.tensor([[2.0, 3.0, 3.0, 6.0]])
    image = torch.zeros(1, 1, 8, 8)
    for prompts in ({"points": points}, {"boxes": boxes}):
        plain = Marked()(image, **prompts).softmax(dim=1)
        found = Averaged([(Marked(), False)], tta)(image, **prompts).exp()
        torch.testing.assert_close(found, plain)


def test_a_published_member_gets_its_points_as_row_and_column() -> None:
    points = (torch.tensor([[[6.0, 1.0]]]), torch.ones(1, 1))
    members = [(Marked(), False), (Marked(row_col=True), True)]
    found = Averaged(members, "flip+rot")(torch.zeros(1, 1, 8, 8), points=points)
    assert found[0, 1, 1, 6].exp() > 0.99


def test_members_count_alike_and_one_alone_decides_as_before() -> None:
    first, second = Toy().eval(), Toy().eval()
    image = torch.rand(2, 1, SIDE, SIDE)
    logits = first(image)
    alone = Averaged([(first, False)])(image)
    assert torch.equal(alone.argmax(dim=1), logits.argmax(dim=1))
    torch.testing.assert_close(alone.softmax(dim=1), logits.softmax(dim=1))
    both = Averaged([(first, False), (second, False)])(image).exp()
    wanted = (logits.softmax(dim=1) + second(image).softmax(dim=1)) / 2
    torch.testing.assert_close(both, wanted)


def test_probabilities_of_zero_stay_finite() -> None:
    class Sure(nn.Module):
        num_classes = 2

        def forward(self, image: Tensor, **prompts: Any) -> Tensor:
            return torch.tensor([0.0, -1e4]).view(1, 2, 1, 1).expand(1, 2, 4, 4)

    assert Averaged([(Sure(), False)], "flip")(torch.zeros(1, 1, 4, 4)).isfinite().all()


DATA = {"classes": ["background", "organ"], "img_size": 224, "input": "2d"}
PATHS = Path("a.pth"), Path("b.pth")


def members(*changes: dict[str, Any], **args: Any) -> list[tuple[Path, dict[str, Any]]]:
    contents = [{"data": DATA | changed, "args": args} for changed in changes]
    return list(zip(PATHS, contents, strict=True))


def test_members_of_other_classes_size_or_input_are_named() -> None:
    pair = members({}, {"encoder": "another"})
    del pair[1][1]["data"]["input"]  # of before there was another input
    check_members(pair, None)
    for changed in ({"img_size": 256}, {"classes": ["background", "liver"]}, {"input": "2.5d"}):
        with pytest.raises(ValueError, match=f"b.pth has {next(iter(changed))}.*a.pth has"):
            check_members(members({}, changed), None)


def test_a_published_member_needs_as_many_classes_only() -> None:
    unnamed = {"classes": ["background", "class 1"], "point_order": "row_col"}
    check_members(members({}, unnamed), None)
    with pytest.raises(ValueError, match="b.pth has classes 3, a.pth has 2"):
        check_members(members({}, unnamed | {"classes": ["a", "b", "c"]}), None)


def test_members_that_saw_the_folds_cases_are_named() -> None:
    check_members(members({}, {}, fold=1), 1)
    with pytest.raises(ValueError, match="--fold 0: a.pth was trained with --fold 1"):
        check_members(members({}, {}, fold=1), 0)
    with pytest.raises(ValueError, match="a.pth was trained without --fold"):
        check_members(members({}, {}), 0)


def test_a_fold_of_the_same_number_but_other_cases_is_named() -> None:
    pair = members({"fold_digest": "a"}, {"fold_digest": "b"}, fold=1)
    check_members(pair[:1], 1, "a")
    with pytest.raises(ValueError, match="b.pth was trained with another fold 1"):
        check_members(pair, 1, "a")
    check_members(members({}, {}, fold=1), 1, "a")  # of before digests: by its number only


def test_a_start_that_saw_the_folds_cases_is_named() -> None:
    run = {"dataset": "word", "digest": "store", "fold_digest": "a"}

    def start(fold: int | None, given: int | None = 1, **changes: Any) -> None:
        check_start(PATHS[0], {"args": {"fold": fold}, "data": run | changes}, given, run)

    start(1)
    start(2, dataset="other", digest="another")
    start(None, digest="another")
    start(None, given=None)
    for changes in ({}, {"digest": "another"}):
        with pytest.raises(ValueError, match="--init a.pth was trained with --fold 0"):
            start(0, **changes)
        with pytest.raises(ValueError, match="--init a.pth was trained with another fold 1"):
            start(1, fold_digest="b", **changes)
    with pytest.raises(ValueError, match="--init a.pth was trained without --fold"):
        start(None)
