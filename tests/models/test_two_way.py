"""Decoders that start from random weights look where prompts point.

Checked on the prompt encoders' own positions, for both models.
"""

from __future__ import annotations

import torch

from usam.models.sam_med3d import build_sam_med3d
from usam.models.usam import build_usam
from usam.weights import usam as weights


def looked_at(attention, token, places) -> torch.Tensor:
    """Index of the place (M,) each token (M, C) attends to most, of places (P, C); all heads."""
    return (attention.q_proj(token) @ attention.k_proj(places).T).argmax(dim=1)


def test_tokens_attend_to_their_place_from_random_weights():
    torch.manual_seed(0)
    model = build_usam("vit_tiny", 3, 112)
    weights.initialize(model, "vit_tiny", "none")
    encoder = model.sam["prompt_encoder"]
    places = encoder.get_dense_pe().flatten(2)[0].T  # (49, 256)
    centre = torch.tensor([[(16 * i + 8.0, 16 * j + 8.0) for j in range(7) for i in range(7)]])
    token = encoder.pe_layer.forward_with_coords(centre, (112, 112))[0]
    for layer in model.sam["mask_decoder"].transformer.layers:
        for attention in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token):
            found = looked_at(attention, token, places)
            assert (found == torch.arange(49)).float().mean() > 0.9


def test_clicks_attend_to_their_place_with_corrected_positions():
    torch.manual_seed(0)
    model = build_sam_med3d("vit_tiny", "corrected")
    encoding = model.prompt_encoder.pe_layer
    places = encoding.grid(4, swapped=False)[0].flatten(1).T  # (64, 384)
    centre = (torch.stack(torch.meshgrid(*3 * [torch.arange(4)], indexing="ij"), -1) + 0.5) / 4
    token = encoding(centre.reshape(-1, 3))
    found = looked_at(
        model.mask_decoder.transformer.layers[0].cross_attn_token_to_image, token, places
    )
    assert (found == torch.arange(64)).float().mean() > 0.9


def test_published_positions_keep_independent_projections():
    attention = build_sam_med3d("vit_tiny").mask_decoder.transformer.final_attn_token_to_image
    assert not torch.equal(attention.q_proj.weight, attention.k_proj.weight)
