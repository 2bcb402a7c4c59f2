"""torch.compile with a way back: compile, try one step, and go on uncompiled where that fails.

u-sam.py compiles through this when `--compile` asks for it; the benchmarks do, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from usam.runtime.precision import Precision
from usam.training.engine import Batch, TrainingStep


def should_compile(choice: str, model: str, device: torch.device) -> bool:
    """Whether `--compile` auto, on or off means compiling `--model`'s training step.

    auto does so for U-SAM on CUDA devices. On a CPU matrix products take most of a step already;
    SAM-Med3D's click rounds wait for numbers in between.
    """
    return choice == "on" or (choice == "auto" and model == "u-sam" and device.type == "cuda")


def compile_training(
    model: nn.Module, step: TrainingStep, samples: Sequence[dict[str, Any]], precision: Precision
) -> bool:
    """Compile `model` in place and try a step on `samples` (a batch of them); whether it worked.

    Names, weights and BatchNorm's statistics stay as they are. A failure, be it of the compiler
    or of the machine's tool chain, gives one warning, and everything goes on uncompiled.
    """
    batch = default_collate(list(samples))
    model.compile()
    try:
        try_step(model, step, batch, precision)
    except Exception as error:  # compilers fail in many types; the same step uncompiled is next
        torch.compiler.set_stance("force_eager")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"--compile failed, going on without: {reason:.200}", stacklevel=2)
        return False
    return True


def try_step(model: nn.Module, step: TrainingStep, batch: Batch, precision: Precision) -> None:
    """Run one training step forward and backward, and leave `model` as it was."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    was_training = model.training
    try:
        with precision.autocast():
            loss = step(model.train(), batch, torch.Generator())
        loss.backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for buffer, value in kept:  # BatchNorm has counted the trial
            buffer.copy_(value)
