"""Checks of a state dict against the network that takes it: names, shapes, finite values."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor, nn


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Put the weights of `state` into `model`, every name and shape as expected, values finite.

    Raises ValueError naming what is wrong, before any is copied. source: what errors call `state`.
    """
    own = model.state_dict()
    # Tensors first: the weights of another encoder differ in both, and its shapes say what it is.
    check_tensors(source, {name: state[name] for name in own if name in state}, own)
    check_names(source, missing=own.keys() - state.keys(), unknown=state.keys() - own.keys())
    model.load_state_dict(dict(state))


def check_names(source: Path | str, missing: Set[str], unknown: Set[str]) -> None:
    """Raises ValueError that names tensors which a file should hold or should not."""
    faults = {"missing": sorted(missing), "unexpected": sorted(unknown)}
    parts = [
        f"{kind} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for kind, names in faults.items()
        if names
    ]
    if parts:
        raise ValueError(f"{source} does not fit this model: {'; '.join(parts)}")


def check_tensors(
    source: Path | str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    """Raises ValueError that names the first tensor of `found` that is not as wanted.

    The shapes must be equal. Where the model computes in floating point, the values must be
    floating and finite; integer buffers, such as counters, may be anything.
    """
    for name, value in found.items():
        own = wanted[name]
        if value.shape != own.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, this model needs "
                f"{tuple(own.shape)}; is it the file of another --sam_model?"
            )
        if own.is_floating_point() and not value.is_floating_point():
            raise ValueError(
                f"{source}: {name} holds {str(value.dtype).removeprefix('torch.')} values; "
                "weights must be floating-point"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = "NaN" if value.isnan().any() else "infinite"
            raise ValueError(f"{source}: {name} holds {bad} values; the file cannot be used")
