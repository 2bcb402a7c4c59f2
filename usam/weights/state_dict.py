"""Checks of a state dict against the network that takes it: every name and every shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Put the weights of `state` into `model`, every name and shape as expected.

    Raises ValueError naming what is missing, unexpected or of another shape, before any is copied.
    """
    own = model.state_dict()
    # Shapes first: the weights of another encoder differ in both, and its shapes say what it is.
    check_shapes(source, {name: state[name] for name in own if name in state}, own)
    check_names(source, missing=own.keys() - state.keys(), unknown=state.keys() - own.keys())
    model.load_state_dict(dict(state))


def check_names(source: Path | str, missing: set[str], unknown: set[str]) -> None:
    """Raises ValueError that names tensors which a file should hold or should not."""
    faults = {"missing": sorted(missing), "unexpected": sorted(unknown)}
    parts = [
        f"{kind} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for kind, names in faults.items()
        if names
    ]
    if parts:
        raise ValueError(f"{source} does not fit this model: {'; '.join(parts)}")


def check_shapes(
    source: Path | str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    """Raises ValueError that names the first tensor of `found` of another shape than wanted."""
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, this model needs "
                f"{tuple(wanted[name].shape)}; is it the file of another --sam_model?"
            )
