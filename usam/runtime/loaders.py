"""DataLoaders for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from usam.runtime.samplers import ClassBalancedSampling, EvaluationShard, TrainingBatches
from usam.runtime.signals import ignore_stop_signals, signals_blocked

Batch = dict[str, Any]
UNREADABLE = "unreadable"  # in an item: why another one replaces it; in a batch: all such reasons
UNREADABLE_SHARE = 0.01  # of the training samples may be unreadable
READ_ERRORS = (OSError, ValueError, EOFError)


class Loader(DataLoader):
    """A DataLoader whose workers ignore stop signals from their start."""

    def __iter__(self) -> Iterator[Any]:
        with signals_blocked():
            return super().__iter__()


def loader_for(data: Dataset, num_workers: int, **options: Any) -> DataLoader:
    """A loader over `data`; options, such as a sampler or a batch sampler, as for DataLoader."""
    return Loader(
        data, num_workers=num_workers, pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0, generator=torch.Generator(),
        worker_init_fn=ignore_stop_signals, **options,
    )  # fmt: skip


def evaluation_loader(data: Dataset, *, num_workers: int, batch_size: int) -> DataLoader:
    """A loader over this process's share of `data`; every sample belongs to exactly one process."""
    shard = EvaluationShard(len(data))
    return loader_for(data, num_workers, sampler=shard, batch_size=batch_size)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch's image (N, C, H, W) float in [0, 1] and mask (N, H, W) long, on `device`."""
    image = batch["image"].to(device, non_blocking=True).float() / 255
    return image, batch["mask"].to(device, non_blocking=True).long()


# ------------------------------------------------------------------ training


def training_loader(
    data: Dataset,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    balanced: ClassBalancedSampling | None = None,
) -> DataLoader:
    """A loader over this process's training batches; its batch sampler is a TrainingBatches."""
    batches = TrainingBatches(len(data), batch_size, seed, balanced)
    return loader_for(SkipUnreadable(data), num_workers, batch_sampler=batches, collate_fn=collate)


def max_unreadable(num_samples: int) -> int:
    """Number of unreadable samples allowed per epoch and process: 1 %, at least one."""
    return max(1, int(num_samples * UNREADABLE_SHARE))


class SkipUnreadable(Dataset):
    """The items of `data` for training; an unreadable one is replaced by the next readable one.

    So every batch keeps its size, which processes that average gradients need. The replacement
    holds under UNREADABLE what was wrong. If too many in a row are unreadable, the last error is
    raised.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, epoch = key
        reason = None
        for more in range(max_unreadable(len(self)) + 1):
            try:
                item = self.data[(index + more) % len(self), epoch]
            except READ_ERRORS as error:
                last_error, reason = error, reason or str(error) or type(error).__name__
                continue
            return item | {UNREADABLE: reason} if reason else item
        raise last_error


def collate(items: list[dict[str, Any]]) -> Batch:
    """A batch of items, with the error texts of unreadable items that were replaced, if any."""
    reasons = [item[UNREADABLE] for item in items if UNREADABLE in item]
    batch = default_collate(
        [{key: value for key, value in item.items() if key != UNREADABLE} for item in items]
    )
    return batch | {UNREADABLE: reasons} if reasons else batch
