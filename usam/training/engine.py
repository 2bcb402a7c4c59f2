"""Training one epoch and evaluating once, for any model that comes with a step function.

u-sam.py hands over a loader and a step: a function from a batch to a loss or to class counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from usam.cli.choices import MIXED
from usam.models.prompts import jittered, mixed_mode, prompts_from_masks
from usam.runtime.loaders import Batch, to_device
from usam.runtime.precision import Precision
from usam.runtime.processes import rank, reduce_sum
from usam.runtime.progress import is_terminal, progress_bar
from usam.training.ema import WeightAverage
from usam.training.epoch_sums import EpochSums
from usam.training.finite_guard import FiniteGuard
from usam.training.losses import segmentation_loss
from usam.training.quarantine import UNREADABLE
from usam.training.schedule import learning_rate_factor

TrainingStep = Callable[[nn.Module, Batch, torch.Generator], Tensor]
Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]

PRINT_EVERY = 10  # steps between two looks at numbers that live on the device
RANK_STRIDE = 15_485_863  # between the seeds of two ranks in one step


def build_optimizer(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over parameter groups whose "lr" is the rate before any schedule.

    The fused form, one pass over the weights, which can leave out a step on the device.
    """
    groups = [group | {"base_lr": group["lr"]} for group in groups]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def segmentation_step(
    augment: Augment,
    prompt_mode: int | str,
    device: torch.device,
    *,
    loss: Loss = segmentation_loss,
    prompt_jitter: float = 0.0,
) -> TrainingStep:
    """The training step of U-SAM: augment, draw prompts from the masks, forward, loss.

    prompt_mode MIXED draws a mode for each step, the same on all ranks; prompt_jitter is in pixels.
    """

    def step(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        image, mask = augment(*to_device(batch, device), generator)
        num_classes = getattr(model, "module", model).num_classes
        mode = mixed_mode(shared_generator(generator)) if prompt_mode == MIXED else prompt_mode
        prompts = prompts_from_masks(mask, num_classes, mode, generator)
        if prompt_jitter:
            prompts = jittered(prompts, prompt_jitter, mask.shape[-1], generator)
        return loss(model(image, **prompts), mask)

    return step


def step_generator(seed: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """The CPU generator of everything a rank draws at random in one step."""
    generator = torch.Generator()
    seeds = torch.tensor([seed, epoch, step, rank], dtype=torch.int64)
    weights = torch.tensor([1, 1_000_003, 7_368_787, RANK_STRIDE], dtype=torch.int64)
    generator.manual_seed(int((seeds * weights).sum()) % (2**63))
    return generator


def shared_generator(generator: torch.Generator) -> torch.Generator:
    """A generator that is the same on all ranks, made of a rank's own of `step_generator`."""
    seed = generator.initial_seed() - (rank() + 1) * RANK_STRIDE  # nobody's rank: -1
    return torch.Generator().manual_seed(seed % (2**63))


@dataclass
class Progress:
    """How far training has come: the next epoch, the next step in it, samples seen by all ranks.

    `skipped_in_a_row` counts the last steps left out, over the ends of epochs.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Recipe:
    """How one epoch is trained; the numbers behind the flags of the same names.

    `total_samples` is what all epochs together will see; `warmup_samples` of them ramp up.
    `decay_at`: see `learning_rate_factor`. `most_unreadable` samples of an epoch and process may
    be missing, before that is an error.
    """

    seed: int
    total_samples: int
    warmup_samples: int = 0
    accumulation_steps: int = 1
    clip_max_norm: float = 0.0
    decay_at: tuple[float, ...] = ()
    most_unreadable: int = 0


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    step: TrainingStep,
    recipe: Recipe,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    average: WeightAverage | None = None,
    begun: Mapping[str, Any] | None = None,
    after_step: Callable[[EpochSums], bool] = lambda sums: False,
) -> dict[str, float | None] | None:
    """Train on what `loader` gives and move `progress` on; mean loss, rate, what was left out.

    The mean is over finite losses, None if there was none.
    The loader starts at `progress.step` of epoch `progress.epoch` (see TrainingBatches); `begun`
    is the state of the sums of an epoch that was stopped there. Learning rates are set before each
    optimizer step from the samples seen so far. The last batches of an epoch are stepped also when
    they are fewer than `accumulation_steps`.
    `average` takes in the weights after every optimizer step; then `after_step` is asked, with the
    sums so far. True ends the epoch there, and None comes back unless it was done.
    Raises ValueError if the gradients stay without a finite value or too much cannot be read.
    """
    model.train()
    sampler, batches = loader.batch_sampler, iter(loader)
    sums = EpochSums(
        model, precision.device, every=scaler.is_enabled(), in_a_row=progress.skipped_in_a_row,
        saved=begun,
    )  # fmt: skip
    stopped = False
    with _progress_bar(len(sampler), progress) as bar:
        while not stopped and (group := list(islice(batches, recipe.accumulation_steps))):
            samples = len(group) * sampler.samples_per_step
            rate = _set_rate(optimizer, recipe, progress.samples, samples)
            for number, batch in enumerate(group, start=1):
                sums.leave_out(batch.pop(UNREADABLE, ()), most=recipe.most_unreadable)
                generator = step_generator(recipe.seed, progress.epoch, progress.step, rank())
                with _without_sync(model, skip=number < len(group)), precision.autocast():
                    loss = step(model, batch, generator)
                    scaler.scale(loss / len(group)).backward()
                sums.add(loss)
                progress.step += 1
            clip = recipe.clip_max_norm
            _optimizer_step(model, optimizer, scaler, sums.guard, clip_max_norm=clip)
            if average:
                average.update()
            progress.samples += samples
            bar.update(len(group))
            if progress.step % PRINT_EVERY < len(group) or progress.step == len(sampler):
                sums.guard.raise_if_stuck()
                _print_figures(bar, sums, rate, sampler.samples_per_step)
            stopped = after_step(sums)
    if progress.step < len(sampler):
        return None
    return _end_epoch(progress, sums, optimizer.param_groups[0]["lr"])


def _end_epoch(progress: Progress, sums: EpochSums, rate: float) -> dict[str, float | None]:
    """Move `progress` to the next epoch; what the sums over all processes come to."""
    progress.epoch, progress.step = progress.epoch + 1, 0
    progress.skipped_in_a_row = int(sums.guard.in_a_row)
    sums.guard.mend_statistics()
    total, number = reduce_sum(sums.losses).tolist()
    return {
        "loss": total / number if number else None,
        "lr": rate,
        "skipped_steps": int(sums.guard.skipped),
        "quarantined": int(reduce_sum(torch.tensor(sums.unreadable))),
    }


def _print_figures(bar: tqdm, sums: EpochSums, rate: float, samples_per_step: int) -> None:
    """Mean loss so far, rate and speed beside the bar; waits for the device."""
    speed = (bar.format_dict["rate"] or 0.0) * samples_per_step
    mean = float(sums.losses[0] / sums.losses[1])
    text = f"loss {mean:.4f}, lr {rate:.2e}, {speed:.1f} images/s"
    bar.set_postfix_str(text, refresh=is_terminal())


def _progress_bar(num_steps: int, progress: Progress) -> tqdm:
    """A bar over the steps of an epoch, on rank 0."""
    name = f"epoch {progress.epoch}"
    return progress_bar(total=num_steps, initial=progress.step, desc=name, unit="step")


def _set_rate(
    optimizer: torch.optim.Optimizer, recipe: Recipe, samples_before: int, samples: int
) -> float:
    """Set every group's rate for the coming step; the first group's rate."""
    factor = learning_rate_factor(
        samples_before, samples, total=recipe.total_samples, warmup=recipe.warmup_samples,
        decay_at=recipe.decay_at,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def _without_sync(model: nn.Module, *, skip: bool) -> AbstractContextManager:
    """A context in which gradients stay with their process, while they are still accumulated."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def _optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: FiniteGuard,
    *,
    clip_max_norm: float,
) -> None:
    """Clip, step unless the gradients are not finite, and clear them."""
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    norm = None
    if clip_max_norm > 0:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_max_norm)
    guard.check(optimizer, norm)
    scaler.step(optimizer)  # an enabled scaler puts its own verdict, the same one, in our place
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
