"""Simulated clicks in volumes: on errors, fair, at the centre of the largest, never outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.test_prompts import seed
from usam.models.prompts import largest_error_click, next_clicks


def cube(shape, low, high):
    volume = torch.zeros(1, *shape, dtype=torch.bool)
    volume[(0, *(slice(a, b) for a, b in zip(low, high, strict=True)))] = True
    return volume


def as_logits(volume):
    return (volume.float() * 2 - 1).unsqueeze(1)


@pytest.mark.parametrize("click", [next_clicks, lambda *args: largest_error_click(*args[:2])])
def test_clicks_fall_on_errors_with_the_masks_label(click):
    mask = torch.rand(40, 5, 6, 7) < 0.4
    logits = torch.randn(40, 1, 5, 6, 7)
    coords, labels = click(logits, mask, seed())
    assert (coords.dtype, labels.dtype) == (torch.float32, torch.int64)
    at = (torch.arange(40), *coords[:, 0].long().unbind(-1))
    assert torch.equal(labels[:, 0], mask[at].long())
    assert torch.equal(logits[:, 0][at] > 0, ~mask[at])
    assert labels.unique().tolist() == [0, 1]


def test_random_clicks_reach_missed_and_added_voxels_equally_often():
    mask, predicted = cube((4, 5, 6), (1, 1, 1), (2, 2, 4)), cube((4, 5, 6), (1, 1, 2), (2, 2, 5))
    many = (3000, -1, -1, -1)
    coords, labels = next_clicks(
        as_logits(predicted).expand(3000, -1, -1, -1, -1), mask.expand(many), seed()
    )
    places, counts = torch.cat([coords[:, 0], labels], 1).unique(dim=0, return_counts=True)
    assert places.tolist() == [[1, 1, 1, 1], [1, 1, 4, 0]]  # missed, added
    assert (counts - 1500).abs().max() < 120


def test_first_click_on_a_zero_prediction_lies_in_the_object():
    mask = cube((4, 5, 6), (1, 2, 3), (2, 3, 5)).expand(50, -1, -1, -1)
    coords, labels = next_clicks(torch.zeros(50, 1, 4, 5, 6), mask.unsqueeze(1), seed())
    assert (labels == 1).all()
    assert coords[:, 0].unique(dim=0).tolist() == [[1, 2, 3], [1, 2, 4]]


def test_a_perfect_prediction_is_clicked_in_the_object():
    mask = cube((4, 5, 6), (1, 2, 3), (3, 4, 5))
    for coords, labels in (
        next_clicks(as_logits(mask), mask, seed()),
        largest_error_click(as_logits(mask), mask),
    ):
        assert labels.tolist() == [[1]]
        assert mask[(0, *coords[0, 0].long())]


def test_no_object_and_no_error_gives_a_negative_click():
    mask = torch.zeros(30, 5, 5, 5, dtype=torch.uint8)
    coords, labels = next_clicks(as_logits(mask), mask, seed())
    assert (labels == 0).all()
    assert len(coords[:, 0].unique(dim=0)) > 20  # anywhere in the volume
    coords, labels = largest_error_click(as_logits(mask), mask)
    assert coords[0].tolist() == [[2, 2, 2]]
    assert (labels == 0).all()


def test_threshold_decides_what_is_object():
    mask = cube((3, 3, 3), (1, 1, 1), (2, 2, 2))
    logits = as_logits(mask) * 0.3
    assert next_clicks(logits, mask, seed(), threshold=0.5)[1].tolist() == [[1]]
    assert largest_error_click(-logits, ~mask, threshold=0.5)[1].tolist() == [[1]]


def test_equal_generators_click_equally_in_volumes_of_real_size():
    mask = torch.zeros(2, 128, 128, 128, dtype=torch.bool)
    mask[0, 5:100, 20:90, 3:127], mask[1, 64, 1, 127] = True, True
    logits = torch.zeros(2, 1, 128, 128, 128)
    first, again = (next_clicks(logits, mask, seed(4))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert first[1].tolist() == [[64, 1, 127]]
    assert mask[(0, *first[0, 0].long())]


def test_largest_error_is_clicked_at_its_centre():
    mask = cube((12, 12, 12), (0, 0, 0), (3, 3, 3)) | cube((12, 12, 12), (5, 5, 6), (10, 10, 11))
    nothing = torch.full((1, 1, 12, 12, 12), -1.0)
    coords, labels = largest_error_click(nothing, mask)
    assert (coords.tolist(), labels.tolist()) == ([[[7, 7, 8]]], [[1]])
    coords, labels = largest_error_click(as_logits(mask), torch.zeros_like(mask))
    assert (coords.tolist(), labels.tolist()) == ([[[7, 7, 8]]], [[0]])
    # A missed and an added region that touch are two regions, not one twice as deep.
    missed, added = cube((9, 9, 9), (1, 1, 1), (4, 4, 4)), cube((9, 9, 9), (4, 1, 1), (9, 6, 6))
    coords, labels = largest_error_click(as_logits(added), missed)
    assert (coords.tolist(), labels.tolist()) == ([[[6, 3, 3]]], [[0]])


def test_depth_in_a_region_equals_scipys_distance():
    ndimage = pytest.importorskip("scipy.ndimage")
    missed = torch.nn.functional.avg_pool3d(torch.rand(6, 1, 24, 17, 20), 5, 1, 2)[:, 0] < 0.49
    coords, _ = largest_error_click(torch.full((6, 1, 24, 17, 20), -1.0), missed)
    for k in range(6):
        depth = ndimage.distance_transform_edt(np.pad(missed[k].numpy(), 1))[1:-1, 1:-1, 1:-1]
        assert depth[tuple(coords[k, 0].long())] == depth.max()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"found \(1, 1, 4, 4, 4\) and \(1, 8, 8, 8\)"):
        next_clicks(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 8, 8, 8), seed())
