"""Initialisation of SAM's two-way transformer for training without pretrained weights.

usam.weights and usam.models.sam_med3d start the decoders of both models so.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import TwoWayTransformer


@torch.no_grad()
def meet_at_positions(transformer: TwoWayTransformer, scale: float = 2.0) -> None:
    """Initialise attention between tokens and image so that equal positions attend to each other.

    Queries and keys begin as one projection, so that a prompt's encoding meets that of its place;
    `scale` sharpens it. From independent projections the network long finds objects by other
    signs, and learns to ignore prompts. Needs encodings of places in the order of the prompts'.
    """
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        attention.q_proj.weight.mul_(scale)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
