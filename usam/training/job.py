"""What the epoch loop of u-sam.py must know of a model; all else is the same for every model.

u-sam.py makes one for U-SAM or for SAM-Med3D and trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from usam.runtime.samplers import ClassBalancedSampling
from usam.training.engine import TrainingStep

Summary = dict[str, Any]
Watch = Callable[[DataLoader], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """One model's training.

    model: the plain module. groups: AdamW's parameter groups. data: training samples, indexed
    with (index, epoch). step: a batch's loss. validate: the same summary on every process, with
    "mean_dice" to choose the best by; its batches come through the function it is given. None where
    no cases are set aside. shown: the figures of a summary to print after each epoch. info: the
    checkpoint's "data". decay_at: shares of the training after which rates fall to a tenth; none:
    they fall steadily. balanced: classes whose samples are drawn more often.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    data: Dataset
    step: TrainingStep
    validate: Callable[[Watch], Summary] | None
    shown: Callable[[Summary], Mapping[str, float | None]]
    info: Mapping[str, Any]
    decay_at: tuple[float, ...] = ()
    balanced: ClassBalancedSampling | None = None
