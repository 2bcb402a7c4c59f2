"""Marks: scribbles and lassos become a few clicks that lie on them."""

from __future__ import annotations

import numpy as np
import pytest

from usam.serving.marks import Mark, box_mark, deep_voxels, lasso_mark, scribble_mark
from usam.serving.objects import Region


def test_a_scribble_becomes_five_clicks_on_it_that_reach_its_ends() -> None:
    painted = np.zeros((1, 3, 41), dtype=bool)
    painted[0, 1] = True
    mark = scribble_mark(painted, (7, 10, 20), inside=True)
    voxels = [voxel for voxel, label in mark.clicks if label]
    assert len(voxels) == 5
    assert voxels[0] == (7, 11, 40)  # the middle first
    assert {voxel[2] for voxel in voxels} >= {20, 60}
    assert all(voxel[:2] == (7, 11) for voxel in voxels)


def test_a_lasso_outline_is_filled_and_clicked_in_its_middle() -> None:
    painted = np.zeros((1, 21, 21), dtype=bool)
    painted[0, [0, -1]] = painted[0, :, [0, -1]] = True
    mark = lasso_mark(painted, (3, 0, 0), inside=False)
    assert mark.clicks[0] == ((3, 10, 10), 0)
    assert len(mark.clicks) == 3
    assert not mark.has_inside
    for (_, row, column), _ in mark.clicks:
        assert 5 <= row <= 15 and 5 <= column <= 15


def test_one_voxel_is_one_click() -> None:
    assert scribble_mark(np.ones((1, 1, 1), dtype=bool), (1, 2, 3), inside=True) == Mark(
        (((1, 2, 3), 1),)
    )
    assert deep_voxels(np.ones((1, 1, 1), dtype=bool), 3).tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="the scribble is empty"):
        scribble_mark(np.zeros((1, 4, 4), dtype=bool), (0, 0, 0), inside=True)


def test_a_box_outside_is_a_click_in_its_centre() -> None:
    assert box_mark((2, 4, 6), (4, 8, 6), inside=False).clicks == (((3, 6, 6), 0),)
    assert box_mark((2, 4, 6), (4, 8, 6), inside=True).box == ((2, 4, 6), (4, 8, 6))


def test_a_region_is_the_tight_part_of_a_mask() -> None:
    mask = np.zeros((5, 6, 7), dtype=bool)
    mask[1, 2:4, 6] = True
    region = Region.of(mask)
    assert region.part == (slice(1, 2), slice(2, 4), slice(6, 7))
    assert region.mask.all()
    assert Region.of(np.zeros((3, 3, 3), dtype=bool)) is None
