"""Losses: recorded numbers of the published code, values by hand, gradients, precision.

Fixtures are recorded in tests/data; see there for how they were made.
"""

from __future__ import annotations

import math

import monai.losses
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from usam.training.losses import cross_entropy, dice_bce_loss, dice_loss, segmentation_loss

TAGS = ["c3", "c17", "c3_absent", "c3_absent_hard"]


def usam_case(recorded, tag):
    """Logits, labels and recorded values of one case of usam_losses_metrics.npz."""
    values = np.load(recorded / "usam_losses_metrics.npz")
    num_classes = 17 if tag == "c17" else 3
    logits = np.random.RandomState(11).standard_normal((4, num_classes, 64, 64)) * 2
    logits[:, 2] -= float(values[f"{tag}_class2_shift"])
    labels = np.random.RandomState(12).randint(
        0, int(values[f"{tag}_label_high"]), (4, 64, 64), dtype=np.int64
    )
    return torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(labels), values


@pytest.mark.parametrize("tag", TAGS)
def test_segmentation_loss_and_gradient_equal_the_published_ones(recorded, tag):
    logits, labels, values = usam_case(recorded, tag)
    logits.requires_grad_()
    loss = segmentation_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(float(values[f"{tag}_loss"]), rel=1e-6)
    gradient = values[f"{tag}_grad"]
    error = np.abs(logits.grad[:, :, ::16, ::16].numpy() - gradient).max()
    assert error <= 1e-4 * np.abs(gradient).max()


@pytest.mark.parametrize("tag", TAGS)
def test_dice_and_cross_entropy_apart_equal_the_published_ones(recorded, tag):
    logits, labels, values = usam_case(recorded, tag)
    cross_entropy = segmentation_loss(logits, labels, ce_weight=1.0, dice_weight=0.0)
    assert dice_loss(logits, labels).item() == pytest.approx(float(values[f"{tag}_dice"]), rel=1e-6)
    assert cross_entropy.item() == pytest.approx(float(values[f"{tag}_ce"]), rel=1e-6)
    coefficients = values[f"{tag}_class_dice_coeff"]
    assert 1 - coefficients.mean() == pytest.approx(float(values[f"{tag}_dice"]), abs=1e-6)


def test_dice_loss_of_two_pixels_by_hand():
    # Equal logits: probability 1/2 everywhere. Class 0: (2 * 1/2) / (1/2 + 1), class 1 the same.
    logits, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    assert dice_loss(logits, target, smooth=0.0).item() == pytest.approx(1 - 2 / 3)
    both = segmentation_loss(logits, target).item()
    assert both == pytest.approx(0.4 * math.log(2) + 0.6 / 3, abs=1e-5)


def test_dice_loss_pools_the_batch():
    # One image right, one wrong: pooled over both pixels each class scores 2 * 1 / (2 + 2)...
    logits = torch.tensor([[[[60.0]], [[-60.0]]], [[[60.0]], [[-60.0]]]])
    target = torch.tensor([[[0]], [[1]]])
    # ... class 0: overlap 1, predicted 2, labelled 1; class 1: overlap 0, predicted 0, labelled 1.
    assert dice_loss(logits, target).item() == pytest.approx(1 - (2 / 3 + 0) / 2, abs=1e-4)


@pytest.mark.parametrize("spatial", [(9,), (4, 5), (3, 4, 5)])
def test_losses_take_any_number_of_spatial_axes(spatial):
    logits, target = torch.randn(2, 3, *spatial), torch.randint(3, (2, *spatial))
    flat = segmentation_loss(logits.flatten(2), target.flatten(1))
    torch.testing.assert_close(segmentation_loss(logits, target), flat)


def test_perfect_prediction_costs_nothing():
    target = torch.randint(3, (2, 8, 8))
    logits = F.one_hot(target, 3).permute(0, 3, 1, 2) * 80.0
    assert segmentation_loss(logits, target).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_stay_in_float32_under_autocast(dtype):
    logits, target = torch.randn(2, 3, 64, 64).to(dtype), torch.randint(3, (2, 64, 64))
    binary = target[:, None] > 1
    with torch.autocast("cpu", dtype=dtype):
        losses = segmentation_loss(logits, target), dice_bce_loss(logits[:, :1], binary)
    exact = segmentation_loss(logits.double(), target), dice_bce_loss(logits[:, :1].float(), binary)
    for loss, wanted in zip(losses, exact, strict=True):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_every_logit_gets_a_finite_gradient_even_when_extreme():
    logits = (torch.randn(2, 3, 8, 8) * 100).requires_grad_()
    segmentation_loss(logits, torch.zeros(2, 8, 8, dtype=torch.long)).backward()
    assert logits.grad.isfinite().all()
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    segmentation_loss(logits, torch.zeros(2, 8, 8, dtype=torch.long)).backward()
    assert (logits.grad != 0).all()


def test_sizes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(2, 4, 4\).*found \(2, 8, 8\)"):
        segmentation_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"found \(2, 1, 8, 8, 8\)"):
        dice_bce_loss(torch.zeros(2, 1, 4, 4, 4), torch.zeros(2, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="one channel"):
        dice_bce_loss(torch.zeros(2, 3, 4, 4, 4), torch.zeros(2, 2, 4, 4, 4))


def binary_case(recorded, tag):
    """Logits, target and recorded values of one case of sam_med3d_loss.npz."""
    values = np.load(recorded / "sam_med3d_loss.npz")
    logits = np.random.RandomState(21).standard_normal((2, 1, 16, 16, 16)).astype(np.float32)
    target = np.random.RandomState(22).uniform(size=(2, 1, 16, 16, 16)) < 0.3
    assert (values["target"] == target).all()
    if tag == "empty":
        target[1] = False
    scale = 10 if tag == "big" else 1
    return torch.from_numpy(logits) * scale, torch.from_numpy(target), values


@pytest.mark.parametrize("tag", ["a", "empty", "big"])
def test_dice_bce_loss_and_gradient_equal_the_recorded_ones(recorded, tag):
    logits, target, values = binary_case(recorded, tag)
    logits.requires_grad_()
    loss = dice_bce_loss(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(float(values[f"{tag}_loss"]), abs=1e-6)
    cross_entropy = F.binary_cross_entropy_with_logits(logits.detach(), target.float()).item()
    assert loss.item() - cross_entropy == pytest.approx(float(values[f"{tag}_dice"]), abs=1e-6)
    gradient = logits.grad[:, :, ::4, ::4, ::4].numpy()
    np.testing.assert_allclose(gradient, values[f"{tag}_grad"], atol=1e-6, rtol=0)


def test_dice_bce_loss_of_several_rounds_is_the_mean_of_each():
    logits = torch.randn(2, 3, 4, 4, 4)
    target = torch.rand(2, 1, 4, 4, 4) < 0.5
    each = [dice_bce_loss(logits[:, k : k + 1], target) for k in range(3)]
    torch.testing.assert_close(dice_bce_loss(logits, target), torch.stack(each).mean())


def test_dice_bce_loss_equals_monai():
    loss = monai.losses.DiceCELoss(sigmoid=True, squared_pred=True)
    logits, target = torch.randn(3, 1, 8, 8, 8), (torch.rand(3, 1, 8, 8, 8) < 0.2).float()
    torch.testing.assert_close(dice_bce_loss(logits, target), loss(logits, target))


def test_a_batch_of_classes_without_weight_costs_nothing():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(2, 4, 4, dtype=torch.long), torch.tensor([0.0, 1, 1]))
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


def test_weighted_cross_entropy_is_the_library_s():
    logits, target = torch.randn(2, 3, 5), torch.randint(3, (2, 5))
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected = F.cross_entropy(logits, target, weight=weights)
    torch.testing.assert_close(cross_entropy(logits, target, weights), expected)
