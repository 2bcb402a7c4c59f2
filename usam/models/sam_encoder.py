"""SAM's ViT image encoder; its exact attention stores neither padded tokens nor an N x N bias.

usam.model builds it; parameter names and numbers are those of `segment_anything`'s own encoder.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import (
    Attention,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from usam.cli.choices import PREPARATIONS, SAM_MODELS

PATCH = 16
WINDOW = 14
PROMPT_WIDTH = 256
SAM_SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of SAM's images


class SamSize(NamedTuple):
    """Sizes of one SAM encoder: channels, blocks, heads and the blocks with global attention."""

    width: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]


SAM_SIZES = {
    "vit_b": SamSize(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": SamSize(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamSize(1280, 32, 16, (7, 15, 23, 31)),
    "vit_tiny": SamSize(96, 4, 3, (1, 3)),  # ours, for tests; no published weights
}
assert {*SAM_SIZES, "vit_t"} == {*SAM_MODELS}  # vit_t, a TinyViT, has one size


class Preparation(nn.Module):
    """Images (N, 1 or 3, H, W) in [0, 1] -> (N, 3, H, W) on the scale an encoder was trained with.

    name: "sam" is SAM's mean and deviation, "minmax" is [0, 1] itself, as MedSAM has it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in PREPARATIONS:
            raise ValueError(f"preparation must be one of {PREPARATIONS}, found {name!r}")
        self.name = name
        mean, std = torch.tensor(SAM_SCALE).view(2, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        image = image.expand(-1, 3, -1, -1)
        return (image - self.mean) / self.std if self.name == "sam" else image


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v over (B, heads, tokens, channels); v may have fewer channels than q and k.

    On the CPU no fused kernel takes unequal channels, and plain products train a bf16 block
    a third faster than scaled_dot_product_attention's fallback.
    """
    if q.device.type == "cpu":
        return (q @ k.transpose(-1, -2)).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


class SamAttention(Attention):
    """SAM's multi-head attention with decomposed relative positions over one square grid.

    Tokens (N, grid, grid, C) -> the same. `window` is the side that SAM attends over: equal to the
    grid (global attention, or a window that fits), smaller (the grid is cut into windows) or
    larger. In the last case SAM pads the normalised tokens with zeros, so that each of the padded
    keys equals the qkv bias and takes part in the softmax; here they are one virtual key.
    `lora`, where there is one, adds to the projection (`usam.lora`): to a padded token nothing.
    """

    def __init__(self, dim: int, num_heads: int, *, grid: int, window: int) -> None:
        super().__init__(dim, num_heads, use_rel_pos=True, input_size=(window, window))
        self.lora: nn.Module | None = None
        self.window = window
        self.cut = window < grid
        self.extent = min(grid, window)  # real tokens along one side of what is attended over
        i, j = torch.arange(self.extent)[:, None], torch.arange(window)
        self.register_buffer("relative", i - j + window - 1, persistent=False)
        positions = key_positions(self.extent, virtual_key=self.extent < window)
        self.register_buffer("key_positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.cut:
            return self.proj(self.attend(self.project(x, self.qkv.bias)))
        side = x.shape[1]
        # Projected before padding: a padded token is exactly the bias, and costs no product.
        windows, padded = window_partition(self.project(x, None), self.window)
        out = self.attend(windows + self.qkv.bias)
        return self.proj(window_unpartition(out, self.window, padded, (side, side)))

    def project(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Queries, keys and values (..., 3C) of tokens (..., C)."""
        qkv = F.linear(x, self.qkv.weight, bias)
        return qkv if self.lora is None else qkv + self.lora(x)

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, n, n, 3C) projected tokens -> (B, n, n, C), before the output projection.

        The bias rel_h[q, kh] + rel_w[q, kw] is folded into the product: queries are extended by
        their relative terms, keys by one-hot rows and columns, so any fused kernel serves.
        """
        B, n, _, _ = qkv.shape
        q, k, v = qkv.reshape(B, n * n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        terms = self.relative_terms(q.unflatten(2, (n, n)))  # (B, heads, n * n, 2n or 2n + 1)
        if n < self.window:
            key, value = self.qkv.bias.to(k.dtype).view(3, 1, self.num_heads, 1, -1)[1:]
            k = torch.cat([k, key.expand(B, -1, -1, -1)], dim=2)
            v = torch.cat([v, value.expand(B, -1, -1, -1)], dim=2)
        positions = self.key_positions.to(k.dtype).expand(*k.shape[:2], -1, -1)
        q = torch.cat([q * self.scale, terms.to(q.dtype)], dim=-1)
        k = torch.cat([k, positions], dim=-1)
        out = attention(q, k, v)
        return out.transpose(1, 2).reshape(B, n, n, -1)

    def relative_terms(self, q: Tensor) -> Tensor:
        """Relative position terms by row, column and, in a larger window, for the virtual key.

        q (B, heads, n, n, C / heads), unscaled as SAM has it.
        """
        n = q.shape[2]
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", q, self.rel_pos_h[self.relative])
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", q, self.rel_pos_w[self.relative])
        terms = [rel_h[..., :n], rel_w[..., :n]]
        if n < self.window:
            exact = torch.promote_types(q.dtype, torch.float32)  # float32 under autocast
            terms.append(padding_logit(rel_h.to(exact), rel_w.to(exact), n).to(q.dtype))
        return torch.cat(terms, dim=-1).flatten(2, 3)


def key_positions(n: int, virtual_key: bool) -> Tensor:
    """One-hot row and column of n * n keys, (n * n, 2n); a virtual key adds a row and a column."""
    eye = torch.eye(n)
    positions = torch.cat([eye.repeat_interleave(n, dim=0), eye.repeat(n, 1)], dim=1)
    if virtual_key:
        positions = F.pad(positions, (0, 1, 0, 1))
        positions[-1, -1] = 1.0
    return positions


def padding_logit(rel_h: Tensor, rel_w: Tensor, n: int) -> Tensor:
    """log sum exp of the relative terms over all padded positions, (..., 1).

    rel_h, rel_w (..., K) float32; a position (row, column) is padded unless both are below n.
    """
    rows, padded_rows = rel_h[..., :n].logsumexp(-1), rel_h[..., n:].logsumexp(-1)
    padded_columns, columns = rel_w[..., n:].logsumexp(-1), rel_w.logsumexp(-1)
    return torch.logaddexp(padded_rows + columns, rows + padded_columns).unsqueeze(-1)


class SamBlock(nn.Module):
    """One pre-norm transformer block of SAM's encoder: tokens (N, h, w, C) -> the same."""

    def __init__(self, dim: int, num_heads: int, *, grid: int, window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SamAttention(dim, num_heads, grid=grid, window=window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SamViT(ImageEncoderViT):
    """SAM's image encoder over tokens: (N, h, w, C) -> embedding (N, 256, h, w).

    The grid has img_size / 16 tokens a side. With patch_embed the module also owns SAM's patch
    embedding, `encoder.patch_embed(image)` -> tokens. Raises ValueError for a size that 16 does
    not divide. Source: Li et al. 2022 (ViTDet), Kirillov et al. 2023 (SAM).
    """

    def __init__(self, size: SamSize, img_size: int, patch_embed: bool = False) -> None:
        if img_size <= 0 or img_size % PATCH:
            raise ValueError(f"img_size must be a positive multiple of {PATCH}, found {img_size}")
        super().__init__(
            img_size=img_size,
            embed_dim=size.width,
            depth=0,
            out_chans=PROMPT_WIDTH,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        if not patch_embed:
            del self.patch_embed
        grid = img_size // PATCH
        for index in range(size.depth):
            window = grid if index in size.global_blocks else WINDOW
            self.blocks.append(SamBlock(size.width, size.num_heads, grid=grid, window=window))

    stride = PATCH

    @property
    def attentions(self) -> list[SamAttention]:
        """The attention of every block, first to last."""
        return [block.attn for block in self.blocks]

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))
