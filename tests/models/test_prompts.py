"""Prompts: the published evaluation rule, geometry, small and empty masks, jitter.

Fixtures are recorded in tests/data; those that need real slices are skipped without them.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from usam.models.prompts import (
    boxes_from_masks,
    jittered,
    next_clicks,
    points_from_masks,
    prompts_from_masks,
)


def seed(number=0):
    return torch.Generator().manual_seed(number)


def random_masks(num_images=4, num_classes=3, height=20, width=30):
    mask = torch.randint(num_classes, (num_images, height, width))
    mask[:, :3], mask[:, :, -4:] = 0, 0
    return mask


def values_at(mask, coords):
    """Mask values (N, P) under points (N, P, 2) in (x, y)."""
    x, y = coords.long().unbind(-1)
    return mask[torch.arange(len(mask)).unsqueeze(1), y, x]


# Boxes and points


def test_evaluation_prompts_equal_the_published_ones(recorded, shared_data):
    slices = json.loads((recorded / "usam_data.json").read_text(encoding="utf-8"))["slices"]
    paths = {path.stem: path for path in shared_data.glob("care/**/*.npz")}
    assert paths.keys() & slices.keys()
    for name in sorted(paths.keys() & slices.keys()):
        wanted = slices[name]
        mask = torch.from_numpy(np.load(paths[name])["label"]).clamp(max=2).long().unsqueeze(0)
        pixels = torch.bincount(mask.flatten(), minlength=3).tolist()
        assert pixels == wanted["mask_pixels_per_class"]
        assert boxes_from_masks(mask).tolist() == [wanted["box_xyxy"]]
        coords, labels = points_from_masks(mask, 3)
        if set(wanted["points_class"]) == {1, 2}:
            assert coords[0].long().tolist() == wanted["points_xy"]
            assert labels.tolist() == [[1] * 6]
        else:  # the published one-class branch draws other points: there the rule is ours
            present = wanted["points_class"][0]
            assert labels[0].view(2, 3)[present - 1].tolist() == [1] * 3
            assert labels[0].view(2, 3)[2 - present].tolist() == [-1] * 3


def test_even_points_by_hand():
    mask = torch.zeros(1, 6, 10, dtype=torch.long)
    mask[0, 1:5, 2:7] = 1  # 20 pixels, 5 a row: numbers 0, 8 and 16 are chosen
    coords, labels = points_from_masks(mask, 2)
    assert coords.tolist() == [[[2, 1], [5, 2], [3, 4]]]
    assert labels.tolist() == [[1, 1, 1]]
    assert (coords.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_box_by_hand_is_xyxy_with_a_margin_of_two():
    mask = torch.zeros(2, 20, 30, dtype=torch.long)
    mask[0, 5, 8], mask[0, 9, 17], mask[1, 0, 0], mask[1, 19, 29] = 1, 2, 2, 1
    assert boxes_from_masks(mask).tolist() == [[6, 3, 19, 11], [0, 0, 30, 20]]
    assert boxes_from_masks(mask, margin=0).tolist() == [[8, 5, 17, 9], [0, 0, 29, 19]]


def test_random_margins_are_zero_to_four_on_each_side_apart():
    mask = torch.zeros(400, 40, 40, dtype=torch.long)
    mask[:, 10:21, 12:25] = 1
    margins = (boxes_from_masks(mask, generator=seed()) - torch.tensor([12, 10, 24, 20])).abs()
    for side in margins.T:
        assert side.unique().tolist() == [0, 1, 2, 3, 4]
        assert side.mean().item() == pytest.approx(2, abs=0.3)
    assert torch.corrcoef(margins.T).triu(1).abs().max() < 0.2


def test_random_points_lie_in_their_own_class():
    mask = random_masks(num_images=50)
    coords, labels = points_from_masks(mask, 3, generator=seed())
    assert (labels == 1).all()
    assert values_at(mask, coords).tolist() == [[1, 1, 1, 2, 2, 2]] * 50


def test_random_points_reach_every_pixel_equally_often():
    mask = torch.zeros(1, 4, 5, dtype=torch.long)
    mask[0, 1, 1:4], mask[0, 3, 4] = 1, 1
    coords, _ = points_from_masks(mask.expand(2000, -1, -1), 2, generator=seed())
    places, counts = coords.reshape(-1, 2).unique(dim=0, return_counts=True)
    assert places.tolist() == [[1, 1], [2, 1], [3, 1], [4, 3]]
    assert (counts - 1500).abs().max() < 150  # four standard deviations


def test_points_are_xy():
    mask = torch.zeros(1, 5, 9, dtype=torch.long)
    mask[0, 1, 7] = 1
    for generator in (None, seed()):
        assert points_from_masks(mask, 2, generator=generator)[0].tolist() == [[[7, 1]] * 3]


@pytest.mark.parametrize("generator_seed", [None, 3])
def test_prompts_move_with_the_mask(generator_seed):
    mask = torch.zeros(2, 16, 16, dtype=torch.long)
    mask[0, 3, 9], mask[1, 12, 5] = 1, 1

    def prompts(mask):
        generator = None if generator_seed is None else seed(generator_seed)
        coords, _ = points_from_masks(mask, 2, generator=generator)
        return coords, boxes_from_masks(mask, margin=0)

    coords, boxes = prompts(mask)
    for moved, x_y in [(mask.flip(2), [15, None]), (mask.flip(1), [None, 15])]:
        wanted_coords, wanted_boxes = coords.clone(), boxes.clone()
        for axis, last in enumerate(x_y):
            if last is not None:
                wanted_coords[..., axis] = last - coords[..., axis]
                wanted_boxes[:, [axis, axis + 2]] = last - boxes[:, [axis + 2, axis]]
        for found, wanted in zip(prompts(moved), (wanted_coords, wanted_boxes), strict=True):
            assert torch.equal(found, wanted)
    turned_coords, turned_boxes = prompts(mask.transpose(1, 2))
    assert torch.equal(turned_coords, coords.flip(-1))
    assert torch.equal(turned_boxes, boxes[:, [1, 0, 3, 2]])


@pytest.mark.parametrize("num_pixels", range(1, 10))
def test_masks_of_a_few_pixels_give_points(num_pixels):
    mask = torch.zeros(1, 8 * 9, dtype=torch.long)
    mask[0, torch.randperm(72)[:num_pixels]] = 1
    mask = mask.view(1, 8, 9)
    for generator in (None, seed(num_pixels)):
        coords, labels = points_from_masks(mask, 2, generator=generator)
        assert labels.tolist() == [[1, 1, 1]]
        assert (values_at(mask, coords) == 1).all()


def test_absent_classes_get_points_that_are_not_points():
    mask = torch.zeros(2, 8, 8, dtype=torch.long)
    mask[0, 4, 4] = 2
    for generator in (None, seed()):
        coords, labels = points_from_masks(mask, 3, generator=generator)
        assert labels.tolist() == [[-1, -1, -1, 1, 1, 1], [-1] * 6]
        assert coords[1].tolist() == [[0, 0]] * 6
        assert coords[0].tolist() == [[0, 0]] * 3 + [[4, 4]] * 3


def test_an_empty_mask_gives_the_whole_image_as_box():
    mask = torch.zeros(2, 6, 9, dtype=torch.long)
    for generator in (None, seed()):
        assert boxes_from_masks(mask, generator=generator).tolist() == [[0, 0, 9, 6]] * 2


def test_a_sample_alone_gets_the_evaluation_prompts_it_gets_in_a_batch():
    mask = random_masks(num_images=70, num_classes=17)
    coords, labels = points_from_masks(mask, 17)
    boxes = boxes_from_masks(mask)
    for k in (0, 33, 69):
        alone = points_from_masks(mask[k : k + 1], 17)
        assert torch.equal(coords[k], alone[0][0])
        assert torch.equal(labels[k], alone[1][0])
        assert torch.equal(boxes[k], boxes_from_masks(mask[k : k + 1])[0])


@pytest.mark.parametrize("points_per_class", [1, 2, 5, 30])
def test_other_numbers_of_points(points_per_class):
    mask = random_masks()
    for generator in (None, seed()):
        coords, labels = points_from_masks(
            mask, 3, points_per_class=points_per_class, generator=generator
        )
        assert coords.shape == (4, 2 * points_per_class, 2)
        wanted = [1] * points_per_class + [2] * points_per_class
        assert values_at(mask, coords).tolist() == [wanted] * 4
        assert (labels == 1).all()


@pytest.mark.parametrize("mode", range(4))
def test_prompt_modes_choose_points_and_boxes(mode):
    prompts = prompts_from_masks(random_masks(), 3, mode, seed())
    assert (prompts["points"] is not None) == (mode in (2, 3))
    assert (prompts["boxes"] is not None) == (mode in (1, 3))


def test_unknown_prompt_mode_is_refused():
    with pytest.raises(ValueError, match="prompt mode 4"):
        prompts_from_masks(random_masks(), 3, 4)


def test_equal_generators_draw_equal_prompts_and_others_do_not():
    mask = random_masks()

    def flat(number):
        prompts = prompts_from_masks(mask, 3, 3, seed(number))
        return torch.cat([prompts["points"][0].flatten(), prompts["boxes"].flatten()])

    assert torch.equal(flat(1), flat(1))
    assert not torch.equal(flat(1), flat(2))
    before = torch.get_rng_state()
    flat(1)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


def test_masks_of_any_integer_type_and_layout():
    mask = random_masks(height=18, width=18)
    turned = mask.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (mask.to(torch.uint8), mask.int(), turned):
        for number in (None, 5):
            generators = [None if number is None else seed(number) for _ in range(2)]
            wanted = prompts_from_masks(mask, 3, 3, generators[0])
            found = prompts_from_masks(other, 3, 3, generators[1])
            assert torch.equal(found["boxes"], wanted["boxes"])
            assert torch.equal(found["points"][0], wanted["points"][0])


def test_prompts_read_nothing_back_from_the_device():
    mask = torch.empty(2, 8, 9, dtype=torch.long, device="meta")  # has no values to read
    for generator in (None, seed()):
        prompts = prompts_from_masks(mask, 3, 3, generator)
        assert prompts["points"][0].shape == (2, 6, 2)
        assert prompts["boxes"].shape == (2, 4)
    volume = torch.empty(2, 1, 4, 5, 6, device="meta")
    coords, labels = next_clicks(volume, volume, seed())
    assert (coords.shape, labels.shape) == ((2, 1, 3), (2, 1))


# ---------------------------------------------------------------------- as users give them


@pytest.mark.parametrize("pixels", [1.0, 6.0])
def test_jitter_moves_every_coordinate_by_up_to_so_many_pixels(pixels):
    coords = torch.full((200, 3, 2), 50.0)
    labels = torch.ones(200, 3, dtype=torch.long)
    boxes = torch.tensor([[30.0, 40.0, 60.0, 70.0]]).repeat(200, 1)
    found = jittered({"points": (coords, labels), "boxes": boxes}, pixels, 100, seed())
    for moved in (found["points"][0] - coords, found["boxes"] - boxes):
        assert moved.abs().max() <= pixels
        assert moved.mean() == pytest.approx(0, abs=0.1 * pixels)
        assert moved.abs().mean() == pytest.approx(pixels / 2, rel=0.1)
    assert found["points"][1] is labels


def test_jittered_prompts_stay_in_the_image_and_boxes_hold_a_pixel():
    coords = torch.tensor([[[0.0, 0.0], [63.0, 63.0], [0.0, 0.0]]]).repeat(100, 1, 1)
    labels = torch.tensor([[1, 1, -1]]).repeat(100, 1)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [30.0, 63.0, 31.0, 64.0]]).repeat(50, 1)
    found = jittered({"points": (coords, labels), "boxes": boxes}, 20, 64, seed())
    moved = found["points"][0]
    assert (moved >= 0).all()
    assert (moved <= 63).all()
    assert (moved[:, 2] == 0).all()  # not a point
    low, high = found["boxes"][:, :2], found["boxes"][:, 2:]
    assert (low >= 0).all()
    assert (high <= 64).all()
    assert (high - low >= 1).all()
    assert not torch.equal(low[1], low[3])


def test_jitter_leaves_out_what_is_not_given():
    assert jittered({"points": None, "boxes": None}, 3, 64, seed()) == {
        "points": None,
        "boxes": None,
    }
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0]])
    first, again = (
        jittered({"points": None, "boxes": boxes}, 3, 64, seed())["boxes"] for _ in range(2)
    )
    assert torch.equal(first, again)
