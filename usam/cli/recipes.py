"""Training recipes by name, and what the values of their flags mean.

usam.flags takes its defaults and presets from here; u-sam.py asks what their values come to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from usam.training.losses import balanced_weights, segmentation_loss

# What --recipe stands for; flags that are given win. `published` is the published training,
# `strong` what validation cases of two stand-ins chose, see docs/evidence.md.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "augment": "published",
        "class_weights": "none",
        "focal_gamma": 0.0,
        "foreground_share": 0.0,
        "ema": 0.0,
        "patience": 0,
    },
    "strong": {
        "augment": "published",
        "class_weights": "balanced",
        "focal_gamma": 0.0,
        "foreground_share": 0.33,
        "ema": 0.98,
        "patience": 0,
    },
}


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
    weights: str, focal_gamma: float, pixels: Sequence[float], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """U-SAM's loss as `--class_weights` and `--focal_gamma` say; see `class_weights` for pixels."""
    numbers = class_weights(weights, pixels)
    of_classes = None if numbers is None else torch.tensor(numbers, device=device)
    return partial(segmentation_loss, class_weights=of_classes, focal_gamma=focal_gamma)


def jitter_pixels(jitter: str, img_size: int) -> float:
    """The `--prompt_jitter` N (pixels) or N% (of the image's side) in pixels."""
    number = float(jitter.removesuffix("%"))
    return number * img_size / 100 if jitter.endswith("%") else number
