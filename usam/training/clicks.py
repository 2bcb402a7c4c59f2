"""SAM-Med3D learns from clicks: the training step, and Dice after some clicks on held-out crops.

u-sam.py puts both into a job; a simulated user on whole scans is in `usam.evaluate3d`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from usam.models.prompts import next_clicks
from usam.models.sam_med3d import SamMed3d
from usam.runtime.precision import Precision
from usam.runtime.processes import reduce_sum
from usam.runtime.progress import progress_bar
from usam.training.engine import Batch, TrainingStep
from usam.training.losses import dice_bce_loss

NUM_CLICKS = (1, 3, 5, 10)  # after which an answer is scored
THRESHOLD = 0.0  # logit above which a voxel is in the object: probability 0.5, in all of training,
# validation and prediction; the published code trains with it and predicts with logit 0.5
CHOICES = {  # where published training and inference disagree; a checkpoint keeps them
    "prompt_mode": "clicks",
    "clicks": "accumulate",
    "threshold": THRESHOLD,
}
DECAY_AT = (0.6, 0.9)  # of the training: epochs 120 and 180 of 200, as published

Normalise = Callable[[Tensor], Tensor]


def click_step(normalise: Normalise, device: torch.device, num_rounds: int) -> TrainingStep:
    """The training step of SAM-Med3D: rounds of clicks inside the model's forward, then the loss.

    normalise: crops (N, 1, S, S, S) of any dtype to float32, on the device.
    """

    def step(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        volume, mask = crops_to_device(batch, normalise, device)
        logits = model(volume, mask, generator, num_rounds=num_rounds)
        return rounds_loss(getattr(model, "module", model), logits, mask)

    return step


def crops_to_device(
    batch: Batch, normalise: Normalise, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The batch's normalised crops (N, 1, S, S, S) and masks (N, 1, S, S, S) uint8, on `device`."""
    volume = batch["image"].to(device, non_blocking=True)
    return normalise(volume), batch["mask"].to(device, non_blocking=True).unsqueeze(1)


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


def click_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator of the simulated user's clicks on the object called `name`.

    It depends on nothing else, so batches, processes and the order of objects change no click.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


@torch.inference_mode()
def click_dice(
    model: SamMed3d,
    loader: Iterable[Batch],
    *,
    normalise: Normalise,
    precision: Precision,
    seed: int,
) -> dict[str, Any]:
    """Dice after 1, 3, 5 and 10 clicks on held-out crops, over all processes.

    `model` is the plain module. Gives {"dice": {"1 click": mean, ...}, "mean_dice": their mean}:
    the best checkpoint is that of the highest mean over the four. Clicks are random, but the
    same in every epoch. An object whose answer is not finite counts as 0.
    """
    model.eval()
    sums = torch.zeros(len(NUM_CLICKS) + 1, dtype=torch.float64, device="cpu")
    for batch in progress_bar(loader, desc="validating"):
        volume, mask = crops_to_device(batch, normalise, precision.device)
        generators = [click_generator(seed, name) for name in batch["id"]]
        with precision.autocast():
            answers = answers_to_clicks(model, volume, mask, generators)
            scores = [
                dice(answer, mask)
                for number, answer in enumerate(answers, start=1)
                if number in NUM_CLICKS
            ]
        sums[:-1] += torch.stack(scores).double().sum(dim=1).cpu()
        sums[-1] += len(mask)
    *totals, number = reduce_sum(sums).tolist()
    means = [total / number for total in totals]
    named = zip(map(clicks_text, NUM_CLICKS), means, strict=True)
    return {"dice": dict(named), "mean_dice": sum(means) / len(means)}


def answers_to_clicks(
    model: SamMed3d, volume: Tensor, mask: Tensor, generators: list[torch.Generator]
) -> Iterator[Tensor]:
    """Logits (N, 1, S, S, S) after each of 10 simulated clicks, one generator a sample.

    As in training: clicks add up, and each round sees the logits of the one before.
    """
    embedding = model.image_encoder(volume)
    logits = embedding.new_zeros(len(volume), 1, *3 * [model.side // 4], dtype=torch.float32)
    answer, coords, labels = model.upscale(logits), [], []
    for _ in range(max(NUM_CLICKS)):
        clicks = [
            next_clicks(answer[n : n + 1], mask[n : n + 1], generator, threshold=THRESHOLD)
            for n, generator in enumerate(generators)
        ]
        coords.append(torch.cat([click[0] for click in clicks]))
        labels.append(torch.cat([click[1] for click in clicks]))
        points = torch.cat(coords, dim=1), torch.cat(labels, dim=1)
        logits = model.decode(embedding, points, logits).float()
        answer = model.upscale(logits)
        yield answer


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Dice (N,) of logits (N, 1, *S) above the threshold and mask (N, 1, *S); 0 if not finite."""
    found, truth = (logits > THRESHOLD).flatten(1), (mask > 0).flatten(1)
    both = (found & truth).sum(dim=1)
    score = 2 * both / (found.sum(dim=1) + truth.sum(dim=1)).clamp(min=1)
    return score.where(logits.flatten(1).isfinite().all(dim=1), 0)


def clicks_text(number: int) -> str:
    """A number of clicks in words, as reports name it."""
    return f"{number} click" if number == 1 else f"{number} clicks"
