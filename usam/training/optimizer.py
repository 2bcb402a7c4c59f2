"""AdamW over parameter groups, and its learning rates as a function of the samples seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def build_optimizer(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over parameter groups whose "lr" is the learning rate before any schedule.

    The fused implementation: one pass over the weights, and it can skip a step on the device.
    """
    groups = [group | {"base_lr": group["lr"]} for group in groups]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to `factor` times its rate before the schedule.

    Returns the first group's rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def warmup_length(total: int, epochs: int) -> int:
    """Samples in the warm-up: half of one epoch, at least one.

    total: samples in the whole training, all epochs and processes together.
    """
    return max(total // epochs // 2, 1)


def learning_rate_factor(
    samples_before: int,
    batch_samples: int,
    total: int,
    *,
    warmup: int = 0,
    power: float = 0.9,
    decay_at: Sequence[float] = (),
) -> float:
    """The learning rate factor, in [0, 1], for the next step.

    samples_before: samples consumed before this step, all processes together;
    batch_samples: samples of this step, all processes and accumulated batches together;
    total: samples in the whole training; warmup: samples of linear warm-up, 0 for none.
    The factor is (1 - (n - warmup) / total) ** power with n = samples_before. In the warm-up it
    is (n + batch_samples) / warmup instead: counting the current batch spares a first step at
    rate zero. The published code sets the same rates one step late. With `decay_at`, shares of
    the training in [0, 1], the factor is instead a tenth for each of them that has passed.
    Raises ValueError if `total` or `batch_samples` is below 1, or another count is negative.
    Source: polynomial decay, Liu et al. 2015 (ParseNet); power 0.9 as in DeepLab v2.
    """
    if total < 1 or batch_samples < 1 or samples_before < 0 or warmup < 0:
        raise ValueError(
            "the learning rate needs total >= 1, batch_samples >= 1, samples_before >= 0 and "
            f"warmup >= 0; found {total}, {batch_samples}, {samples_before} and {warmup}"
        )
    if samples_before < warmup:
        return min((samples_before + batch_samples) / warmup, 1.0)
    if decay_at:
        return 0.1 ** sum(samples_before >= share * total for share in decay_at)
    # Dropped batches can leave n short of total, a last batch kept whole can push it beyond.
    remaining = max(1 - (samples_before - warmup) / total, 0.0)
    return remaining**power
