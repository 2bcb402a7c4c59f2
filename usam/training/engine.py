"""One epoch of training, for any model that comes with a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from usam.runtime.loaders import UNREADABLE, Batch
from usam.runtime.precision import Precision
from usam.runtime.processes import rank, reduce_sum
from usam.runtime.progress import is_terminal, progress_bar
from usam.training.checkpoint import Progress, TrainingState
from usam.training.epoch_sums import EpochSums, FiniteGuard
from usam.training.optimizer import learning_rate_factor, set_learning_rates

TrainingStep = Callable[[nn.Module, Batch, torch.Generator], Tensor]  # -> the batch's loss

PRINT_EVERY = 10  # steps between two looks at numbers that live on the device
RANK_STRIDE = 15_485_863  # between the seeds of two ranks in one step


@dataclass(frozen=True)
class Recipe:
    """Settings for training an epoch.

    total_samples: samples of all epochs together; warmup_samples: those of the warm-up.
    decay_at: see `learning_rate_factor`. most_unreadable: how many samples of an epoch and process
    may be unreadable.
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
    state: TrainingState,
    *,
    step: TrainingStep,
    recipe: Recipe,
    precision: Precision,
    after_step: Callable[[EpochSums], bool] = lambda sums: False,
) -> dict[str, float | None] | None:
    """Train the epoch at `state.progress`, or the rest of it; returns its figures for log.jsonl.

    model: `state.model`, perhaps wrapped in DistributedDataParallel. The loader's batch sampler is
    a TrainingBatches. Learning rates are set before each optimizer step from the samples seen so
    far; the last batches of an epoch are stepped even if they are fewer than `accumulation_steps`.
    The average is updated after every optimizer step; then `after_step` is called with the sums so
    far. If it returns True the epoch stops there, and the result is None unless it was complete.
    The mean loss is over finite losses, None if there were none. Raises ValueError if gradients
    stay without a finite value or too many samples are unreadable.
    """
    model.train()
    progress, sampler = state.progress, loader.batch_sampler
    sampler.epoch, sampler.first_step = progress.epoch, progress.step
    batches = iter(loader)
    sums = EpochSums(
        model, precision.device, every=state.scaler.is_enabled(),
        in_a_row=progress.skipped_in_a_row, saved=state.in_epoch,
    )  # fmt: skip
    stopped = False
    with _progress_bar(len(sampler), progress) as bar:
        while not stopped and (group := list(islice(batches, recipe.accumulation_steps))):
            samples = len(group) * sampler.samples_per_step
            factor = learning_rate_factor(
                progress.samples, samples, total=recipe.total_samples,
                warmup=recipe.warmup_samples, decay_at=recipe.decay_at,
            )  # fmt: skip
            rate = set_learning_rates(state.optimizer, factor)
            for number, batch in enumerate(group, start=1):
                sums.add_unreadable(batch.pop(UNREADABLE, ()), most=recipe.most_unreadable)
                generator = step_generator(recipe.seed, progress.epoch, progress.step, rank())
                with _without_sync(model, skip=number < len(group)), precision.autocast():
                    loss = step(model, batch, generator)
                    state.scaler.scale(loss / len(group)).backward()
                sums.add(loss)
                progress.step += 1
            _optimizer_step(model, state, sums.guard, clip_max_norm=recipe.clip_max_norm)
            state.average.update()
            progress.samples += samples
            bar.update(len(group))
            if progress.step % PRINT_EVERY < len(group) or progress.step == len(sampler):
                sums.guard.raise_if_stuck()
                _print_figures(bar, sums, rate, sampler.samples_per_step)
            stopped = after_step(sums)
    return None if progress.step < len(sampler) else _end_epoch(state, sums)


def step_generator(seed: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """The CPU generator for all random draws of a rank in one step."""
    generator = torch.Generator()
    seeds = torch.tensor([seed, epoch, step, rank], dtype=torch.int64)
    weights = torch.tensor([1, 1_000_003, 7_368_787, RANK_STRIDE], dtype=torch.int64)
    generator.manual_seed(int((seeds * weights).sum()) % (2**63))
    return generator


def shared_generator(generator: torch.Generator) -> torch.Generator:
    """A generator that is the same on all ranks, derived from a rank's own of `step_generator`."""
    seed = generator.initial_seed() - (rank() + 1) * RANK_STRIDE  # as of rank -1
    return torch.Generator().manual_seed(seed % (2**63))


def _end_epoch(state: TrainingState, sums: EpochSums) -> dict[str, float | None]:
    """Move `state.progress` to the next epoch; returns the epoch's figures over all processes."""
    epoch, progress = state.progress.epoch, state.progress
    progress.epoch, progress.step = epoch + 1, 0
    progress.skipped_in_a_row = int(sums.guard.in_a_row)
    state.in_epoch = None
    sums.guard.repair_statistics()
    total, number = reduce_sum(sums.losses).tolist()
    return {
        "epoch": epoch,
        "loss": total / number if number else None,
        "lr": state.optimizer.param_groups[0]["lr"],
        "skipped_steps": int(sums.guard.skipped),
        "unreadable": int(reduce_sum(torch.tensor(sums.unreadable))),
        "samples": progress.samples,
    }


def _print_figures(bar: tqdm, sums: EpochSums, rate: float, samples_per_step: int) -> None:
    """Mean loss so far, learning rate and speed beside the bar; waits for the device."""
    speed = (bar.format_dict["rate"] or 0.0) * samples_per_step
    mean = float(sums.losses[0] / sums.losses[1])
    text = f"loss {mean:.4f}, lr {rate:.2e}, {speed:.1f} images/s"
    bar.set_postfix_str(text, refresh=is_terminal())


def _progress_bar(num_steps: int, progress: Progress) -> tqdm:
    """A bar over the steps of an epoch, on rank 0."""
    name = f"epoch {progress.epoch}"
    return progress_bar(total=num_steps, initial=progress.step, desc=name, unit="step")


def _without_sync(model: nn.Module, *, skip: bool) -> AbstractContextManager:
    """Context manager that does not average gradients over processes, while they accumulate."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def _optimizer_step(
    model: nn.Module, state: TrainingState, guard: FiniteGuard, *, clip_max_norm: float
) -> None:
    """Clip, step unless the gradients are not finite, and clear them."""
    optimizer, scaler = state.optimizer, state.scaler
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    norm = None
    if clip_max_norm > 0:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_max_norm)
    guard.check(optimizer, norm)
    scaler.step(optimizer)  # an enabled scaler replaces our found_inf by its own, the same one
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
