"""Memory for time: activations of the encoder's blocks are computed again in the backward pass.

u-sam.py asks for it where `--checkpoint_activations` is given; results stay the same.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(model: nn.Module) -> None:
    """Let each block of the image encoder keep its input only, and run again in backward.

    One block's activations then exist at a time, for a third more work in the blocks. Blocks
    draw nothing at random, so no generator's state is kept. Source: Chen et al. 2016.
    """
    for name, part in model.named_modules():
        if name.split(".")[-1] == "image_encoder":
            for block in part.blocks:
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
