"""Options of a training step: torch.compile with a fallback, and activation checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from usam.runtime.loaders import Batch
from usam.runtime.precision import Precision
from usam.training.engine import TrainingStep


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the input of each block of the image encoder; recompute the rest in backward.

    Less memory for a third more work in the blocks; the results are the same. Blocks draw nothing
    at random, so no generator's state is kept. Source: Chen et al. 2016.
    """
    for name, part in model.named_modules():
        if name.split(".")[-1] == "image_encoder":
            for block in part.blocks:
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )


def should_compile(choice: str, model: str, device: torch.device) -> bool:
    """Whether `--compile` auto, on or off means compiling the training step of `--model`.

    auto compiles U-SAM on CUDA devices. On a CPU, matrix products take most of a step already;
    SAM-Med3D's click rounds wait for numbers in between.
    """
    return choice == "on" or (choice == "auto" and model == "u-sam" and device.type == "cuda")


def compile_training(
    model: nn.Module, step: TrainingStep, samples: Sequence[dict[str, Any]], precision: Precision
) -> bool:
    """Compile `model` in place and try a step on a batch of `samples`; returns whether it worked.

    Names, weights and BatchNorm's statistics stay the same. If the compiler or its tools fail,
    this warns once and training runs uncompiled.
    """
    batch = default_collate(list(samples))
    model.compile()
    try:
        try_step(model, step, batch, precision)
    except Exception as error:  # compilers fail in many types; the same step uncompiled is next
        torch.compiler.set_stance("force_eager")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"--compile failed, training uncompiled: {reason:.200}", stacklevel=2)
        return False
    return True


def try_step(model: nn.Module, step: TrainingStep, batch: Batch, precision: Precision) -> None:
    """Run one training step forward and backward, and restore `model` afterwards."""
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
