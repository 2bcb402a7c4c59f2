"""The volumetric encoder attends as the published one does, without computing with padding.

Small blocks are compared in float64 with gradients recorded from the padded reference.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.fill import fill
from usam.models import sam_med3d_encoder as vit3d
from usam.models.sam_med3d_encoder import Block3d, ImageEncoder3d

BLOCKS = {"w7": ((4, 4, 4), 7), "g4": ((4, 4, 4), 4), "w3": ((4, 4, 4), 3), "w4": ((3, 5, 4), 4)}
TINY = {"dim": 24, "num_heads": 2, "out_dim": 12, "rel_pos": "published"}


def close(found: torch.Tensor, wanted: np.ndarray, tolerance: float) -> None:
    """Fail unless all values agree within an absolute tolerance."""
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.detach().numpy() - wanted).max() <= tolerance


@pytest.mark.parametrize("mode", ["published", "corrected"])
@pytest.mark.parametrize("tag", BLOCKS)
def test_block_and_its_gradients_match_the_padded_reference(
    recorded: Path, tag: str, mode: str
) -> None:
    wanted = np.load(recorded / "sam_med3d_small_blocks_f64.npz")
    grid, window = BLOCKS[tag]
    block = Block3d(48, num_heads=2, window=window, rel_pos=mode).double()
    names = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    block.load_state_dict(
        {name: torch.from_numpy(fill(f"block.{name}", shape)) for name, shape in names.items()}
    )
    x = torch.from_numpy(np.random.RandomState(77).standard_normal((2, *grid, 48))).requires_grad_()
    out = block(x)
    out.backward(torch.from_numpy(np.random.RandomState(78).standard_normal(out.shape)))

    suffix, kind = ("", "grad") if mode == "published" else ("_fixed", "gradfixed")
    close(out[..., ::3], wanted[f"{tag}_out{suffix}"], 1e-12)
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    gradients["x"] = x.grad[..., ::3]
    for name in [name for name in wanted if name.startswith(f"{tag}_{kind}_")]:
        close(gradients[name.removeprefix(f"{tag}_{kind}_")], wanted[name], 1e-12)


@pytest.mark.parametrize("mode", ["published", "corrected"])
@pytest.mark.parametrize("tag", BLOCKS)
def test_slabs_of_queries_change_nothing(monkeypatch, tag: str, mode: str) -> None:
    grid, window = BLOCKS[tag]
    block = Block3d(24, num_heads=2, window=window, rel_pos=mode).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, *grid, 24, dtype=torch.float64)
    at_once = block(x)
    monkeypatch.setattr(vit3d, "LOGITS_PER_PASS", 1)
    torch.testing.assert_close(block(x), at_once, rtol=0, atol=1e-12)


def attention_sizes(monkeypatch, side: int, rel_pos: str) -> list[tuple[int, int]]:
    """(queries, keys) of every attention of a narrow encoder: one windowed, one global block."""
    sizes, attention = [], F.scaled_dot_product_attention

    def record(q, k, v, attn_mask):
        sizes.append((q.shape[-2], k.shape[-2]))
        assert attn_mask.shape[-2:] == sizes[-1]
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    options = {**TINY, "dim": 4, "num_heads": 1, "rel_pos": rel_pos}
    encoder = ImageEncoder3d(side=side, depth=2, global_blocks=(1,), **options)
    with torch.no_grad():
        encoder(torch.zeros(1, 1, side, side, side))
    return sizes


@pytest.mark.parametrize("mode", ["published", "corrected"])
def test_attention_at_128_has_one_key_for_all_padding(monkeypatch, mode: str) -> None:
    assert attention_sizes(monkeypatch, 128, mode) == [(512, 513), (512, 512)]


def test_attention_at_256_holds_real_tokens_only(monkeypatch) -> None:
    sizes = attention_sizes(monkeypatch, 256, "published")
    assert all(queries * keys <= vit3d.LOGITS_PER_PASS for queries, keys in sizes)
    windows = [(d, h, w) for d in (14, 2) for h in (14, 2) for w in (14, 2)]
    real = sum(d * h * w for d, h, w in windows)
    assert real == 16**3
    assert sum(queries for queries, _ in sizes) == 2 * real
    keys = {d * h * w + (min(d, h, w) < 14) for d, h, w in windows}
    assert {keys for _, keys in sizes} == keys | {16**3}


def test_position_logits_are_float32_under_autocast(monkeypatch) -> None:
    dtypes, rule = [], vit3d.BIAS_RULES["published"]

    def record(terms, extent):
        real, padded = rule[1](terms, extent)
        dtypes.append((terms[0].dtype, real.dtype, padded.dtype))
        return real, padded

    monkeypatch.setitem(vit3d.BIAS_RULES, "published", (rule[0], record))
    encoder = ImageEncoder3d(side=64, depth=1, global_blocks=(), **TINY)
    torch.nn.init.normal_(encoder.blocks[0].attn.rel_pos_d)
    volume = torch.randn(1, 1, 64, 64, 64)
    exact = encoder(volume)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encoder(volume)
    assert dtypes == 2 * [3 * (torch.float32,)]
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.1)


def test_encoder_names_the_volume_it_wants() -> None:
    encoder = ImageEncoder3d(side=32, depth=1, global_blocks=(), **TINY)
    with pytest.raises(ValueError, match=r"\(N, 1, 32, 32, 32\), found \(1, 1, 64, 64, 64\)"):
        encoder(torch.zeros(1, 1, 64, 64, 64))
