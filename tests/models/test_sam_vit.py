"""SAM's encoder without padded tokens equals `segment_anything`'s own encoder.

Tiny encoders in float64, so that only a wrong formula can make a difference.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from usam.models.sam_encoder import SAM_SIZES, SamViT, attention, key_positions, padding_logit

SIZE = SAM_SIZES["vit_tiny"]


def sam_encoder(img_size: int) -> ImageEncoderViT:
    """segment_anything's encoder at the tiny size, every tensor random."""
    encoder = ImageEncoderViT(
        img_size=img_size,
        embed_dim=SIZE.width,
        depth=SIZE.depth,
        num_heads=SIZE.num_heads,
        out_chans=256,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=SIZE.global_blocks,
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.double()


@pytest.mark.parametrize("grid", [7, 14, 16, 20])  # window larger, equal, smaller (twice)
def test_encoder_equals_segment_anything(grid):
    reference = sam_encoder(16 * grid)
    encoder = SamViT(SIZE, 16 * grid, patch_embed=True).double()
    encoder.load_state_dict(reference.state_dict())  # strict: the same names
    image = torch.randn(2, 3, 16 * grid, 16 * grid, dtype=torch.double)
    wanted, found = reference(image), encoder(encoder.patch_embed(image))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    direction = torch.randn_like(wanted)
    wanted_gradients = torch.autograd.grad(wanted, list(reference.parameters()), direction)
    found_gradients = torch.autograd.grad(found, list(encoder.parameters()), direction)
    for (name, _), a, b in zip(
        reference.named_parameters(), found_gradients, wanted_gradients, strict=True
    ):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), name


def test_fused_attention_equals_the_cpu_products():
    q, k, v = torch.randn(1, 2, 5, 12), torch.randn(1, 2, 6, 12), torch.randn(1, 2, 6, 8)
    fused = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(attention(q, k, v), fused)


def test_padding_logit_counts_every_padded_position():
    rel = torch.zeros(1, 14)  # 14^2 - 7^2 = 147 positions, each with logit 0
    assert padding_logit(rel, rel, 7).item() == pytest.approx(torch.tensor(147.0).log().item())


def test_key_positions_name_row_and_column():
    positions = key_positions(3, virtual_key=True)
    assert positions.shape == (10, 7)
    assert positions[5].tolist() == [0, 1, 0, 0, 0, 1, 0]  # key 5 = row 1, column 2
    assert positions[9].tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_index_buffers_stay_out_of_the_state_dict():
    names = SamViT(SIZE, 112).state_dict()
    assert not [name for name in names if "relative" in name or "key_positions" in name]


@pytest.mark.parametrize("img_size", [0, 100, -16])
def test_size_not_divisible_by_16_is_refused(img_size):
    with pytest.raises(ValueError, match=f"multiple of 16, found {img_size}"):
        SamViT(SIZE, img_size)
