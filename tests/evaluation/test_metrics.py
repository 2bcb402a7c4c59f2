"""Metrics: pooled counts against recorded numbers and by hand, strict JSON, the printed table.

Fixtures are recorded in tests/data; see there for how they were made.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests.training.test_losses import usam_case
from usam.evaluation.metrics import ClassCounts, rank_score

NAMES = ["background", "rectum", "tumour"]


def counts_of(prediction, target, num_classes=3):
    counts = ClassCounts(num_classes)
    counts.update(prediction, target)
    return counts


@pytest.mark.parametrize("tag", ["c3", "c17", "c3_absent", "c3_absent_hard"])
def test_counts_equal_the_published_numerators_and_denominators(recorded, tag):
    logits, labels, values = usam_case(recorded, tag)
    matrix = counts_of(logits, labels, logits.shape[1]).tensor
    overlap, size = matrix.diagonal(), matrix.sum(0) + matrix.sum(1)
    np.testing.assert_array_equal((2 * overlap).numpy(), values[f"{tag}_dice_num"])
    np.testing.assert_array_equal(size.numpy(), values[f"{tag}_dice_den"])
    np.testing.assert_array_equal(overlap.numpy(), values[f"{tag}_iou_num"])
    np.testing.assert_array_equal((size - overlap).numpy(), values[f"{tag}_iou_den"])


@pytest.mark.parametrize("tag", ["c3", "c17"])
def test_means_equal_the_published_ones(recorded, tag):
    logits, labels, values = usam_case(recorded, tag)
    names = [str(number) for number in range(logits.shape[1])]
    summary = counts_of(logits, labels, len(names)).summary(names)
    assert summary["mean_dice"] == pytest.approx(float(values[f"{tag}_mean_dice"]), abs=1e-6)
    assert summary["mean_iou"] == pytest.approx(float(values[f"{tag}_miou"]), abs=1e-6)
    assert summary["absent"] == []


def test_a_class_absent_everywhere_is_left_out_where_the_published_mean_is_nan(recorded):
    logits, labels, values = usam_case(recorded, "c3_absent")
    assert math.isnan(values["c3_absent_mean_dice"])
    summary = counts_of(logits, labels).summary(NAMES)
    assert summary["absent"] == ["tumour"]
    assert summary["dice"]["tumour"] is None
    assert summary["iou"]["tumour"] is None
    assert summary["mean_dice"] == summary["dice"]["rectum"] == 8220 / 16436


def test_values_by_hand():
    target = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
    prediction = torch.tensor([[[0, 1, 1], [1, 2, 0]]])
    counts = counts_of(prediction, target)
    assert counts.tensor.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    summary = counts.summary(NAMES)
    assert summary["dice"] == {"background": 0.5, "rectum": 0.8, "tumour": 2 / 3}
    assert summary["iou"] == {"background": 1 / 3, "rectum": 2 / 3, "tumour": 0.5}
    assert summary["mean_dice"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert summary["mean_iou"] == pytest.approx((2 / 3 + 0.5) / 2)


@pytest.mark.parametrize("predicted", [True, False])
def test_a_class_absent_on_one_side_scores_zero_and_counts(predicted):
    some, none = torch.full((1, 2, 2), 2), torch.zeros(1, 2, 2, dtype=torch.long)
    counts = counts_of(some, none) if predicted else counts_of(none, some)
    summary = counts.summary(NAMES)
    assert summary["dice"]["tumour"] == 0.0
    assert summary["absent"] == ["rectum"]
    assert summary["mean_dice"] == 0.0


def test_nothing_but_background_has_no_mean_and_is_strict_json():
    for counts in (ClassCounts(3), counts_of(torch.zeros(2, 4, 4).long(), torch.zeros(2, 4, 4))):
        summary = counts.summary(NAMES)
        assert summary["mean_dice"] is None
        assert summary["mean_iou"] is None
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_batches_and_shards_change_nothing():
    logits, target = torch.randn(7, 3, 5, 6), torch.randint(3, (7, 5, 6))
    whole = counts_of(logits, target).tensor
    shards = [ClassCounts(3) for _ in range(3)]
    for k in range(7):
        shards[k % 3].update(logits[k : k + 1], target[k : k + 1])
    assert torch.equal(sum(shard.tensor for shard in shards), whole)
    assert whole.dtype == torch.int64


@pytest.mark.parametrize("spatial", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_maps_of_any_axes_and_type(spatial, dtype):
    prediction, target = torch.randint(17, (2, *spatial)), torch.randint(17, (2, *spatial))
    wanted = torch.bincount((target * 17 + prediction).flatten(), minlength=289).view(17, 17)
    found = counts_of(prediction.to(dtype), target.to(dtype), 17).tensor
    assert torch.equal(found, wanted)


def test_counts_beyond_float_precision_stay_exact():
    counts = ClassCounts(2)
    counts.tensor[0, 0] = 2**53
    counts.update(torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 1).long())
    assert counts.tensor[0, 0].item() == 2**53 + 1


def test_update_reads_nothing_back_from_the_device():
    counts = ClassCounts(3, "meta")  # a device that has no values to read
    counts.update(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(2, 8, 8, device="meta"))
    assert counts.tensor.shape == (3, 3)


def test_an_empty_batch_counts_nothing():
    counts = counts_of(torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.long))
    assert counts.tensor.sum() == 0


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"labels \(N, \*S\).*found \(2, 4, 8, 8\)"):
        counts_of(torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 8).long())
    with pytest.raises(ValueError, match="wanted 3 class names, found 2"):
        ClassCounts(3).summary(["background", "rectum"])


def test_classes_of_one_name_keep_their_own_scores():
    target = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
    counts = counts_of(torch.where(target == 1, 0, target), target)
    summary = counts.summary(["background", "a", "a"])
    assert summary["dice"] == {"background": 2 / 3, "a (class 1)": 0, "a (class 2)": 1}
    assert summary["mean_dice"] == 0.5


def test_none_and_nan_rank_below_every_number():
    assert rank_score(None) == rank_score(float("nan")) < rank_score(-1e300) < rank_score(0.0)
    assert max([0.1, None, float("nan"), 0.0], key=rank_score) == 0.1


def test_foreground_only_leaves_out_samples_without_foreground() -> None:
    target = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]]])
    prediction = torch.tensor([[[0, 0, 1, 0]], [[1, 0, 0, 0]]])
    counts = ClassCounts(2)
    counts.update(prediction, target)
    names = ["background", "object"]
    assert counts.summary(names)["dice"]["object"] == pytest.approx(2 * 1 / (2 + 2))
    published = counts.summary(names, foreground_only=True)
    assert published["dice"]["object"] == pytest.approx(2 * 1 / (2 + 1))
