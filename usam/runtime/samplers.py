"""Assigns samples to processes, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from usam.runtime.processes import rank, world_size


class ClassBalancedSampling(NamedTuple):
    """Class-balanced sampling: rare classes are drawn more often.

    share: fraction of an epoch's samples that is drawn from `groups` instead: a group (of sample
    indices, one group per class) is chosen uniformly, then one of its samples. Empty groups are
    left out. Source: nnU-Net (Isensee et al. 2021), which draws a third of its patches around
    foreground.
    """

    share: float
    groups: list[np.ndarray]


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Batches of one process in one epoch, each a list of (sample index, epoch).

    The order is a permutation drawn from (seed, epoch), in which `balanced` replaces a share of
    the samples; consecutive runs of world_size * batch_size samples are one step, dealt out to
    the ranks. The incomplete last step is dropped unless it is the only one, so every rank takes
    the same number of steps. An index carries its epoch because what a data set draws at random
    depends on both.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        balanced: ClassBalancedSampling | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError("there are no training samples")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.balanced = balanced
        self.epoch = 0
        self.first_step = 0

    @property
    def samples_per_step(self) -> int:
        """Samples all ranks together take in one step."""
        return min(self.batch_size * world_size(), self.num_samples)

    def __len__(self) -> int:
        """Steps in a whole epoch, also when it is resumed in the middle."""
        return self.num_samples // self.samples_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._order()
        for step in range(self.first_step, len(self)):
            start = step * self.samples_per_step
            block = order[start : start + self.samples_per_step]
            share = block[rank() :: world_size()]
            if not len(share):  # fewer samples than ranks: some serve twice
                share = block[rank() % len(block) :][:1]
            yield [(int(index), self.epoch) for index in share]

    def _order(self) -> np.ndarray:
        """Sample indices (num_samples,) in the order of the epoch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.num_samples)
        groups = [group for group in self.balanced.groups if len(group)] if self.balanced else []
        if groups:
            places = np.flatnonzero(rng.random(self.num_samples) < self.balanced.share)
            chosen = rng.integers(len(groups), size=len(places))
            order[places] = [rng.choice(groups[number]) for number in chosen]
        return order


class EvaluationShard(Sampler[int]):
    """This rank's samples of an evaluation: every world_size-th, none twice, none left out."""

    def __init__(self, num_samples: int) -> None:
        self.indices = range(rank(), num_samples, world_size())

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class CaseShard(Sampler[int]):
    """This rank's samples of an evaluation: all of every world_size-th case, case after case.

    case_ids: the case of each sample; cases keep the order in which they come first. Among all
    ranks each sample comes once.
    """

    def __init__(self, case_ids: Sequence[str]) -> None:
        cases: dict[str, list[int]] = {}
        for index, case in enumerate(case_ids):
            cases.setdefault(case, []).append(index)
        self.indices = [i for own in list(cases.values())[rank() :: world_size()] for i in own]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
