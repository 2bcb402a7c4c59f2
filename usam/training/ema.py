"""An exponential moving average of the weights, which often segments better than the last ones.

u-sam.py keeps one beside the model; the engine updates it, validation and best.pth use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """The average of a model's trained parameters over the steps, float, on their devices.

    After n steps the weights so far count min(decay, (1 + n) / (10 + n)), so that the start is
    soon forgotten (Polyak and Juditsky 1992; the rule of TensorFlow's ExponentialMovingAverage).
    Buffers are the model's own: BatchNorm's statistics are running means already. With decay 0
    there is no average: nothing is held, and `weights` is empty. saved: a `state_dict` to go on
    from; raises ValueError where it is another model's.
    """

    def __init__(
        self, model: nn.Module, decay: float, saved: Mapping[str, Any] | None = None
    ) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trained = trained if decay else {}
        self.decay, self.num_updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in self._trained.items()}
        if decay and saved:
            self._take(saved)

    def _take(self, saved: Mapping[str, Any]) -> None:
        shapes = {name: value.shape for name, value in self.weights.items()}
        if {name: value.shape for name, value in saved["weights"].items()} != shapes:
            raise ValueError("the checkpoint's averaged weights are not those of this model")
        self.num_updates = saved["num_updates"]
        for name, value in self.weights.items():
            value.copy_(saved["weights"][name])

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average; after each optimizer step."""
        if not self.weights:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        now = list(self._trained.values())
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the model's parameters hold the average."""
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
        """What a checkpoint keeps: the averaged weights by name and how many steps they saw."""
        return {"num_updates": self.num_updates, "weights": self.weights}
