"""Losses on logits of any number of spatial axes: soft Dice joined with cross-entropy.

U-SAM minimises `segmentation_loss`, SAM-Med3D `dice_bce_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """Mean soft Dice loss over all classes, background included; 0 is perfect.

    logits (N, C, *S) float, unnormalised; target (N, *S) long in [0, C).
    Sums run over the batch and its pixels together and in float32, under autocast too. A class
    that is neither labelled nor predicted scores 0, `smooth` over `smooth`.
    Raises ValueError if batch or spatial sizes differ.
    Source: Milletari et al. 2016, squared denominator.
    """
    _check_sizes(logits, target)
    probability = logits.float().softmax(dim=1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    labelled = target.unsqueeze(1) == classes.view(-1, *[1] * (target.dim() - 1))  # (N, C, *S)
    axes = [0, *range(2, logits.dim())]
    overlap = probability.where(labelled, 0).sum(axes)  # (C,)
    size = probability.square().sum(axes) + labelled.sum(axes)
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ce_weight: float = 0.4,
    dice_weight: float = 0.6,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of cross-entropy and Dice loss, the weights as published for U-SAM.

    logits (N, C, *S) float, unnormalised; target (N, *S) long in [0, C). Computed in float32.
    class_weights: of the cross-entropy, see there.
    Raises ValueError if batch or spatial sizes differ.
    """
    _check_sizes(logits, target)
    return ce_weight * cross_entropy(logits, target, class_weights) + dice_weight * dice_loss(
        logits, target
    )


def cross_entropy(logits: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over pixels, in float32.

    logits (N, C, *S) float, unnormalised; target (N, *S) long in [0, C). class_weights (C,) float,
    on the logits' device, weight each pixel by its true class; the mean is then over weights.
    """
    logits = logits.float()
    if class_weights is None:
        return F.cross_entropy(logits, target)
    loss = F.cross_entropy(logits, target, reduction="none")
    weights = class_weights[target]
    return (weights * loss).sum() / weights.sum().clamp(min=1e-6)  # all 0: no class that counts


def class_weights(choice: str, pixels: Sequence[float]) -> list[float] | None:
    """The weights that `--class_weights` names, one per class; None for none.

    choice: none, balanced or numbers separated by commas; pixels: of each class in the training
    data. Raises ValueError for numbers below 0, all 0 or not as many as classes.
    """
    if choice == "none":
        return None
    if choice == "balanced":
        return balanced_weights(pixels)
    weights = [float(number) for number in choice.split(",")]
    if len(weights) != len(pixels) or min(weights) < 0 or not sum(weights):
        raise ValueError(
            f"--class_weights {choice}: wanted {len(pixels)} numbers of 0 or more, one per class, "
            "background first"
        )
    return weights


def balanced_weights(pixels: Sequence[float]) -> list[float]:
    """A weight per class, 1 / sqrt(its number of pixels), scaled to a mean of 1.

    pixels: of each class in the training data. A class without any gets the weight of the rarest.
    Without the root, an organ would weigh a thousand times as much as the background.
    """
    rarest = min((count for count in pixels if count > 0), default=1)
    weights = [1 / math.sqrt(max(count, rarest)) for count in pixels]
    return [weight * len(weights) / sum(weights) for weight in weights]


def dice_bce_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """Soft Dice loss plus binary cross-entropy of one object per channel, weighted 1 and 1.

    logits (N, C, *S) float, unnormalised, each channel a prediction of its own (SAM-Med3D: a
    click round); target (N, 1 or C, *S), 1 in the object and 0 outside, any dtype.
    Dice is taken per sample and channel, then averaged; computed in float32. The published sum
    over C rounds is C times this mean.
    Raises ValueError if the sizes do not fit. Source: Milletari et al. 2016, squared denominator.
    """
    wanted = (logits.shape[0], target.shape[1], *logits.shape[2:])
    if target.shape != wanted or target.shape[1] not in (1, logits.shape[1]):
        raise ValueError(
            f"logits {tuple(logits.shape)} need a target of the same shape, or with one channel; "
            f"found {tuple(target.shape)}"
        )
    logits, truth = logits.float(), target.float().expand_as(logits)
    probability = logits.sigmoid()
    overlap = (probability * truth).flatten(2).sum(2)  # (N, C)
    size = (probability.square() + truth.square()).flatten(2).sum(2)
    dice = 1 - ((2 * overlap + smooth) / (size + smooth)).mean()
    return dice + F.binary_cross_entropy_with_logits(logits, truth)


def _check_sizes(logits: Tensor, target: Tensor) -> None:
    wanted = (logits.shape[0], *logits.shape[2:])
    if target.shape != wanted:
        raise ValueError(
            f"logits {tuple(logits.shape)} need a target of shape {wanted}, "
            f"found {tuple(target.shape)}; resize one to the other"
        )
