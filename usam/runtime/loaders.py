"""Loaders over any of the data sets: how training and evaluation hand out samples.

u-sam.py and sam_med3d.py make theirs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from usam.runtime.samplers import EvaluationShard
from usam.runtime.signals import signals_held, sit_out_signals

Batch = dict[str, Any]


class Loader(DataLoader):
    """A DataLoader whose workers sit out the signals that ask a run to stop, from their start."""

    def __iter__(self) -> Iterator[Any]:
        with signals_held():
            return super().__iter__()


def loader_for(data: Dataset, num_workers: int, **how: Any) -> DataLoader:
    """A loader over `data`; `how` names the sampler or batch sampler."""
    return Loader(
        data, num_workers=num_workers, pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0, generator=torch.Generator(),
        worker_init_fn=sit_out_signals, **how,
    )  # fmt: skip


def evaluation_loader(data: Dataset, *, num_workers: int, batch_size: int) -> DataLoader:
    """A loader over this process's share of `data`, each sample once among all processes."""
    shard = EvaluationShard(len(data))
    return loader_for(data, num_workers, sampler=shard, batch_size=batch_size)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch's image (N, C, H, W) float in [0, 1] and mask (N, H, W) long, on `device`."""
    image = batch["image"].to(device, non_blocking=True).float() / 255
    return image, batch["mask"].to(device, non_blocking=True).long()
