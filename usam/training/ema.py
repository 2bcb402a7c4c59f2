"""An exponential moving average of the weights, which often segments better than the last ones.

Validation and best.pth use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """The average of a model's trained parameters over the steps, float, on their devices.

    After n steps the average so far is weighted with min(decay, (1 + n) / (10 + n)), so that the
    first weights are soon forgotten (Polyak and Juditsky 1992; the rule of TensorFlow's
    ExponentialMovingAverage). Buffers are the model's own: BatchNorm's statistics are running
    means already. With decay 0 there is no average and `weights` is empty.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trained = trained if decay else {}
        self.decay, self.num_updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's present weights to the average; called after each optimizer step."""
        if not self.weights:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        now = list(self._trained.values())
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context manager in which the model's parameters hold the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._trained.items():
            kept = parameter.clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the averaged weights by name and the number of updates."""
        return {"num_updates": self.num_updates, "weights": self.weights}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; raises ValueError for the average of another model."""
        shapes = {name: value.shape for name, value in self.weights.items()}
        if {name: value.shape for name, value in saved["weights"].items()} != shapes:
            raise ValueError("the checkpoint's averaged weights are those of another model")
        self.num_updates = saved["num_updates"]
        for name, value in self.weights.items():
            value.copy_(saved["weights"][name])
