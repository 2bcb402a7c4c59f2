"""Left and right classes: which ids trade places, and that flips do not mix them up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dataset.sides import sides
from dataset.transforms import augment, draw
from dataset.word import ORGANS
from usam.models.ensemble import Averaged


@pytest.mark.parametrize(
    ("names", "ids", "unpaired"),
    [
        (["background", "left kidney", "right kidney"], (0, 2, 1), ()),
        (["background", "liver", "Kidney_R", "kidney_l"], (0, 1, 3, 2), ()),
        (["background", "left lung", "heart"], (0, 1, 2), ("left lung",)),
        (["background", "tumour", "bright spot"], (0, 1, 2), ()),
        (["background", "RightKidney", "LeftKidney", "spleen"], (0, 2, 1, 3), ()),
        (["background", "spleen", "rkid", "lkid", "gall"], (0, 1, 3, 2, 4), ()),
        (["background", "RV", "MYO", "LV", "right atrium", "left atrium"], (0, 1, 2, 3, 4, 5), ()),
        (["background", "left lateral ventricle", "right lateral ventricle"], (0, 2, 1), ()),
        (["background", "lungleft", "lungright", "rib_r2", "rib_l2"], (0, 2, 1, 4, 3), ()),
        (["background", "vertebra L1", "Lt lung", "Rt lung"], (0, 1, 3, 2), ()),
        (["background", "left lung", "Left-Lung", "right lung"], (0, 3, 2, 1), ("Left-Lung",)),
    ],
)
def test_names_state_sides(names: list[str], ids: tuple, unpaired: tuple) -> None:
    found = sides(names)
    assert (found.ids, found.unpaired) == (ids, unpaired)
    assert found.any == (ids != tuple(range(len(ids))) or bool(unpaired))


def test_words_organs_are_paired() -> None:
    found = sides(["background", *ORGANS])
    assert [n for n, other in enumerate(found.ids) if n != other] == [3, 4, 15, 16]
    assert not found.unpaired


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(64, 8, 8, dtype=torch.long)
    mask[:, 1:3, 0:2], mask[:, 4:6, 5:8] = 1, 2
    return mask[:, None] / 2, mask


def test_flipped_samples_swap_ids_and_others_do_not() -> None:
    image, mask = batch()
    plain = augment(image, mask, torch.Generator().manual_seed(1))[1]
    swapped = augment(
        image, mask, torch.Generator().manual_seed(1), mirrored_ids=torch.tensor([0, 2, 1])
    )[1]
    flipped = draw(64, torch.Generator().manual_seed(1)).flip >= 0
    assert 0 < flipped.sum() < 64
    assert torch.equal(swapped[~flipped], plain[~flipped])
    assert torch.equal(swapped[flipped] == 1, plain[flipped] == 2)
    assert torch.equal(swapped[flipped] == 2, plain[flipped] == 1)


def test_without_flips_the_same_turns_are_drawn() -> None:
    image, mask = batch()
    draws = draw(64, torch.Generator().manual_seed(1))
    _, still = augment(image, mask, torch.Generator().manual_seed(1), flips=False)
    turned_only = ((draws.flip >= 0) | (draws.quarters > 0)) & (draws.angle == 0)
    for k in turned_only.nonzero().flatten().tolist():
        assert torch.equal(still[k], torch.rot90(mask[k], int(draws.quarters[k])))


class BySide(nn.Module):
    """Class 1 on the left half of the image, 2 on the right: it knows sides by their place."""

    num_classes = 3

    def forward(self, image: torch.Tensor, points: None = None, boxes: None = None) -> torch.Tensor:
        logits = torch.full((len(image), 3, *image.shape[-2:]), -20.0)
        logits[:, 1, :, : image.shape[-1] // 2] = 20.0
        logits[:, 2, :, image.shape[-1] // 2 :] = 20.0
        return logits


def test_a_mirrored_view_swaps_sides_back() -> None:
    image, wanted = torch.zeros(1, 1, 8, 8), BySide()(torch.zeros(1, 1, 8, 8)).argmax(dim=1)
    for ids, right in ((None, False), ([0, 2, 1], True)):
        model = Averaged([(BySide(), False)], "flip", ids)
        model.views = ((0, True),)
        assert model(image).argmax(dim=1).equal(wanted) == right
