"""Augmentation: turns and flips move pixels exactly, image and mask move together."""

from __future__ import annotations

import pytest
import torch

from dataset import transforms
from dataset.transforms import Draws


def _draws(quarters: int = 0, flip: int = -1, angle: float = 0.0, num: int = 1) -> Draws:
    return Draws(
        torch.full((num,), quarters), torch.full((num,), flip), torch.full((num,), float(angle))
    )


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("flip", [-1, 0, 1])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_turns_and_flips_are_exact_permutations(quarters: int, flip: int, size: int) -> None:
    image = torch.rand(2, 3, size, size)
    mask = torch.randint(0, 3, (2, size, size))
    turned, labels = transforms.apply(image, mask, _draws(quarters, flip, num=2))
    wanted, wanted_labels = image.rot90(quarters, (-2, -1)), mask.rot90(quarters, (-2, -1))
    if flip >= 0:
        wanted, wanted_labels = wanted.flip(flip + 2), wanted_labels.flip(flip + 1)
    assert torch.equal(turned, wanted)
    assert torch.equal(labels, wanted_labels)


def test_a_rotation_moves_image_and_mask_together_and_brings_in_zeros() -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.long)
    mask[0, 20:44, 28:36] = 2
    image = mask[:, None].float() / 2
    turned, labels = transforms.apply(image, mask, _draws(angle=15))
    assert labels.unique().tolist() == [0, 2]
    assert ((turned[:, 0] > 0.5) != (labels == 2)).float().mean() < 0.005
    corner, _ = transforms.apply(torch.ones_like(image), mask, _draws(angle=20))
    assert corner[0, 0, 0, 0] == 0
    assert corner[0, 0, 32, 32] == pytest.approx(1)


def test_a_rotation_is_by_the_angle_in_degrees() -> None:
    y, x = torch.meshgrid(torch.arange(65.0) - 32, torch.arange(65.0) - 32, indexing="ij")
    bar = ((x.abs() < 25) & (y.abs() < 2)).long()[None]
    _, labels = transforms.apply(bar[:, None].float(), bar, _draws(angle=20))
    inside = labels[0] == 1
    slope = (x * y)[inside].sum() / (x * x)[inside].sum()
    assert torch.rad2deg(torch.atan(slope.abs())) == pytest.approx(20, abs=1)


def test_samples_are_drawn_at_the_published_rates() -> None:
    draws = transforms.draw(20_000, torch.Generator().manual_seed(1))
    turned, rotated = draws.flip >= 0, draws.angle != 0
    assert turned.float().mean() == pytest.approx(0.5, abs=0.02)
    assert rotated.float().mean() == pytest.approx(0.25, abs=0.02)
    assert not (turned & rotated).any()
    assert draws.angle.abs().max() <= 20
    assert draws.quarters[turned].bincount().div(turned.sum()).sub(0.25).abs().max() < 0.02
    assert (draws.quarters[~turned] == 0).all()


def test_the_same_generator_state_gives_the_same_batch() -> None:
    image, mask = torch.rand(8, 1, 16, 16), torch.randint(0, 3, (8, 16, 16))
    first = transforms.augment(image, mask, torch.Generator().manual_seed(5))
    again = transforms.augment(image, mask, torch.Generator().manual_seed(5))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].dtype == torch.float32
    assert first[1].dtype == torch.long
    assert not torch.equal(first[0], image)


def test_oblong_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        transforms.augment(torch.rand(1, 1, 8, 9), torch.zeros(1, 8, 9).long(), torch.Generator())
