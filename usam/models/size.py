"""The size of a model: parameters by part, and multiply-accumulates of one forward pass.

u-sam.py prints both when a run starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(parts: Mapping[str, Sequence[nn.Parameter]]) -> str:
    """Trained and total parameters in all, and the trained ones by part, in millions."""
    total = sum(p.numel() for part in parts.values() for p in part)
    trained = {
        name: sum(p.numel() for p in part if p.requires_grad) for name, part in parts.items()
    }
    split = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in trained.items() if count)
    return (
        f"{sum(trained.values()) / 1e6:.2f} M of {total / 1e6:.2f} M parameters trained ({split})"
    )


def multiply_accumulates(model: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of one forward pass over an input of this shape.

    Products and convolutions are counted, on tensors without values: nothing is computed and the
    model stays as it is. Half of what is called FLOPs; the papers' "GFLOPs" are these.
    """
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    was_training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(model.eval(), state, (torch.empty(shape, device="meta"),))
    model.train(was_training)
    return counter.get_total_flops() // 2
