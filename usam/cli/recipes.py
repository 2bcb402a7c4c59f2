"""Training recipes by name, and what the values of their flags mean.

usam.flags takes its defaults and presets from here; u-sam.py asks what their values come to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from usam.training.losses import balanced_weights, segmentation_loss


def class_weights(choice: str, pixels: Sequence[float]) -> list[float] | None:
    """The weights that `--class_weights` names, one a class; None for none.

    choice: none, balanced or numbers with commas between them; pixels: of each class in the
    training data. Raises ValueError for numbers below 0, all 0 or not as many as classes.
    """
    if choice == "none":
        return None
    if choice == "balanced":
        return balanced_weights(pixels)
    weights = [float(number) for number in choice.split(",")]
    if len(weights) != len(pixels) or min(weights) < 0 or not sum(weights):
        raise ValueError(
            f"--class_weights {choice}: wanted {len(pixels)} numbers of 0 or more, one a class, "
            "background first"
        )
    return weights


def chosen_loss(
    weights: str, pixels: Sequence[float], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """U-SAM's loss with the weights of `--class_weights`; see `class_weights` for pixels."""
    numbers = class_weights(weights, pixels)
    of_classes = None if numbers is None else torch.tensor(numbers, device=device)
    return partial(segmentation_loss, class_weights=of_classes)
