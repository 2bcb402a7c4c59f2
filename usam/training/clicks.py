"""SAM-Med3D learns from clicks: its training step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from usam.evaluation.clicks import Normalise, crops_to_device
from usam.models.sam_med3d import THRESHOLD, SamMed3d
from usam.runtime.loaders import Batch
from usam.training.engine import TrainingStep
from usam.training.losses import dice_bce_loss

CHOICES = {  # where published training and inference disagree; a checkpoint keeps them
    "prompt_mode": "clicks",
    "clicks": "accumulate",
    "threshold": THRESHOLD,
}
DECAY_AT = (0.6, 0.9)  # of the training: epochs 120 and 180 of 200, as published


def click_step(normalise: Normalise, device: torch.device, num_rounds: int) -> TrainingStep:
    """The training step of SAM-Med3D: rounds of clicks inside the model's forward, then the loss.

    normalise: crops (N, 1, S, S, S) of any dtype to float32, on the device.
    """

    def step(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        volume, mask = crops_to_device(batch, normalise, device)
        logits = model(volume, mask, generator, num_rounds=num_rounds)
        return rounds_loss(getattr(model, "module", model), logits, mask)

    return step


def rounds_loss(model: SamMed3d, logits: Tensor, mask: Tensor) -> Tensor:
    """Dice and cross-entropy at full size, summed over the rounds as published.

    logits (N, rounds, s, s, s) of low resolution; mask (N, 1, S, S, S). One round is upscaled at a
    time and again in the backward pass, so that full size is never held for all of them.
    """

    def one_round(answer: Tensor) -> Tensor:
        return dice_bce_loss(model.upscale(answer.float()), mask)

    answers = logits.split(1, dim=1)
    losses = [
        checkpoint(one_round, answer, use_reentrant=False, preserve_rng_state=False)
        for answer in answers
    ]
    return torch.stack(losses).sum()
