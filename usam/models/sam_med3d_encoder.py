"""SAM-Med3D's image encoder: a ViT over voxels whose windowed attention never sees padding.

usam.model3d builds it; `window_attention` is the published attention, exact and far cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from usam.models.full_precision import full_precision

LOGITS_PER_PASS = 2**20  # queries x keys of one head; beyond it queries go slab by slab


class LayerNorm3d(nn.Module):
    """Layer norm over the channels of (N, C, D, H, W)."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        last = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return last.movedim(-1, 1)


def offset_table(rel_pos: Tensor) -> Tensor:
    """Position vectors R[i, :, j] = rel_pos[i - j + K - 1] for query i and key j.

    rel_pos (2K - 1, c) -> (K, c, K).
    """
    size = (rel_pos.shape[0] + 1) // 2
    return rel_pos.unfold(0, size, 1).flip(-1)


def published_terms(q: Tensor, bias_q: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Position logits indexed as in the published code, with which the weights were trained.

    q (N, heads, d, h, w, c) unscaled queries of a window's real tokens, bias_q (heads, c) the
    query of a padded token, tables as from `offset_table`, first row for the first query. Of the
    row of tokens that shares (d, h) with the query, the token at w-position d' (then h') stands
    in for the query itself.
    Returns A (..., d, h, w, w'), B (..., d, h, d', w') and C (..., d, h, h', w'), primed axes
    of length K. Source: uni-medical/SAM-Med3D issue 101.
    """
    depth, height, width = q.shape[2:5]
    size = tables[0].shape[-1]
    row = q
    if width < size:
        padded = bias_q[:, None, None, None].expand(*q.shape[:4], size - width, -1)
        row = torch.cat([q, padded], dim=4)
    own = torch.einsum("nedhwc,dck->nedhwk", q, tables[0][:depth])
    from_depth = torch.einsum("nedhic,hck->nedhik", row, tables[1][:height])
    from_height = torch.einsum("nedhic,ick->nedhik", row, tables[2])
    return [own, from_depth, from_height]


def published_bias(terms: Sequence[Tensor], extent: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Logits added for real keys, and the one logit that stands for all padded keys.

    terms as from `published_terms`; extent (d', h', w') counts the real keys an axis, K at most.
    Returns (..., d, h, w, d', h', w') and (..., d, h, w), or None where no key is padded: the
    log-sum-exp over padded keys of A[w'] + B[d', w'] + C[h', w'], one axis after the other.
    """
    a, b, c = terms
    depth, height, width = extent
    size = a.shape[-1]
    cross = b[..., :depth, None, :width] + c[..., None, :height, :width]  # (..., d, h, d', h', w')
    real = a[..., None, None, :width] + cross.unsqueeze(-4)

    any_depth, any_height = b.logsumexp(-2), c.logsumexp(-2)
    outside = []  # d' or h' is padded
    if depth < size:
        outside.append(b[..., depth:, :].logsumexp(-2) + any_height)
    if height < size:
        real_depth = any_depth if depth == size else b[..., :depth, :].logsumexp(-2)
        outside.append(real_depth + c[..., height:, :].logsumexp(-2))
    padded = []
    if outside:
        both = torch.stack(outside).logsumexp(0).unsqueeze(-2)
        padded.append(a[..., :width] + both[..., :width])
    if width < size:
        padded.append(a[..., width:] + (any_depth + any_height).unsqueeze(-2)[..., width:])
    return real, torch.cat(padded, dim=-1).logsumexp(-1) if padded else None


def corrected_terms(q: Tensor, bias_q: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Position logits as intended: every query with its own depth, height and width offsets.

    q (N, heads, d, h, w, c), tables as from `offset_table`; bias_q plays no part.
    Returns three tensors (..., d, h, w, K). Source: Li et al. 2022 (MViTv2), decomposed.
    """
    return [
        torch.einsum(f"nedhwc,{axis}ck->nedhwk", q, table[:n])
        for axis, table, n in zip("dhw", tables, q.shape[2:5], strict=True)
    ]


def corrected_bias(terms: Sequence[Tensor], extent: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Like `published_bias`, for the terms of `corrected_terms`."""
    size = terms[0].shape[-1]
    real = [term[..., :n] for term, n in zip(terms, extent, strict=True)]
    logits = real[0][..., :, None, None] + real[1][..., None, :, None] + real[2][..., None, None, :]

    whole = [term.logsumexp(-1) for term in terms]
    padded = []
    for axis, n in enumerate(extent):  # real before this axis, padded on it, anything after it
        if n < size:
            before = [term.logsumexp(-1) for term in real[:axis]]
            padded.append(sum([*before, terms[axis][..., n:].logsumexp(-1), *whole[axis + 1 :]]))
    return logits, torch.stack(padded).logsumexp(0) if padded else None


BIAS_RULES = {
    "published": (published_terms, published_bias),
    "corrected": (corrected_terms, corrected_bias),
}


def window_attention(
    qkv: Tensor, *, qkv_bias: Tensor, rel_pos: Sequence[Tensor], mode: str
) -> Tensor:
    """Attention within windows whose real tokens come first on every axis; padding is exact.

    qkv (N, d, h, w, 3, heads, c): projections of the real tokens only. qkv_bias (3, heads, c):
    what every padded token projects to, as the published code pads after the norm. rel_pos:
    three tables (2K - 1, c) for windows of K^3 tokens. Returns (N, d, h, w, heads, c).
    All padded keys together are one more key, so nothing is computed with a padded token; at most
    about 2^20 logits a head exist at once (slabs of queries along d are independent).
    """
    extent = tuple(qkv.shape[1:4])
    tables = [offset_table(table) for table in rel_pos]
    q, k, v = qkv.movedim(4, 0).movedim(-2, 2)  # each (N, heads, d, h, w, c)
    k, v = k.flatten(2, 4), v.flatten(2, 4)
    if min(extent) < tables[0].shape[-1]:
        k, v = (
            torch.cat([x, bias[:, None].to(x.dtype).expand(len(x), -1, -1, -1)], dim=2)
            for x, bias in ((k, qkv_bias[1]), (v, qkv_bias[2]))
        )
    rows = max(1, LOGITS_PER_PASS // (extent[1] * extent[2] * k.shape[2]))
    slabs = []
    for start in range(0, extent[0], rows):
        slab = q[:, :, start : start + rows]
        # Rows cut from `start` on: the table's first row belongs to the slab's first query.
        cut = [tables[0][start:], *tables[1:]]
        bias = position_bias(slab, bias_q=qkv_bias[0], tables=cut, extent=extent, mode=mode)
        out = F.scaled_dot_product_attention(slab.flatten(2, 4), k, v, attn_mask=bias)
        slabs.append(out.transpose(1, 2).unflatten(1, slab.shape[2:5]))
    return slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=1)


def position_bias(
    q: Tensor, *, bias_q: Tensor, tables: Sequence[Tensor], extent: Sequence[int], mode: str
) -> Tensor:
    """Logits to add for some queries: (N, heads, queries, keys) in q's dtype.

    q (N, heads, d, h, w, c) may be a slab along d; extent (d', h', w') counts all real keys. The
    padded keys' one logit comes last where there are any. Computed in float32 at least, also
    under autocast: half precision has no room for a log-sum-exp over some 2000 keys.
    """
    terms_of, bias_of = BIAS_RULES[mode]
    wide = torch.promote_types(q.dtype, torch.float32)
    with full_precision(q.device):
        terms = terms_of(q.to(wide), bias_q.to(wide), [table.to(wide) for table in tables])
        bias, padded = bias_of(terms, extent)
        bias = bias.flatten(-3).flatten(2, 4)
        if padded is not None:
            bias = torch.cat([bias, padded.flatten(2).unsqueeze(-1)], dim=-1)
    return bias.to(q.dtype)


def axis_parts(length: int, window: int) -> list[tuple[int, int, int]]:
    """Split an axis into whole windows and the remainder: (start, tokens per window, windows)."""
    whole, rest = divmod(length, window)
    parts = [(0, window, whole)] if whole else []
    return [*parts, (whole * window, rest, 1)] if rest else parts


class Attention3d(nn.Module):
    """Multi-head attention of (N, D, H, W, C) tokens within windows of window^3 tokens.

    A window equal to the grid makes it global. Windows that reach past the grid attend to padded
    tokens as published, see `window_attention`. Names are the published ones.
    """

    def __init__(self, dim: int, *, num_heads: int, window: int, rel_pos: str) -> None:
        super().__init__()
        self.num_heads, self.window, self.mode = num_heads, window, rel_pos
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for axis in "dhw":
            table = nn.Parameter(torch.zeros(2 * window - 1, dim // num_heads))
            self.register_parameter(f"rel_pos_{axis}", table)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        out = qkv.new_empty(*x.shape[:-1], self.num_heads, qkv.shape[-1])
        for part in product(*(axis_parts(length, self.window) for length in x.shape[1:4])):
            here = (slice(None), *(slice(at, at + n * count) for at, n, count in part))
            out[here] = self.attend(qkv[here], [count for _, _, count in part])
        return self.proj(out.flatten(-2))

    def attend(self, qkv: Tensor, counts: Sequence[int]) -> Tensor:
        """Attention in counts[0] x counts[1] x counts[2] windows of one size, side by side.

        qkv (N, D, H, W, 3, heads, c) -> (N, D, H, W, heads, c).
        """
        split = qkv
        for axis, count in zip((1, 3, 5), counts, strict=True):
            split = split.unflatten(axis, (count, -1))
        windows = split.permute(0, 1, 3, 5, 2, 4, 6, 7, 8, 9).flatten(0, 3)
        out = window_attention(
            windows,
            qkv_bias=self.qkv.bias.view(3, self.num_heads, -1),
            rel_pos=(self.rel_pos_d, self.rel_pos_h, self.rel_pos_w),
            mode=self.mode,
        )
        out = out.unflatten(0, (-1, *counts)).permute(0, 1, 4, 2, 5, 3, 6, 7, 8)
        return out.flatten(5, 6).flatten(3, 4).flatten(1, 2)


class Block3d(nn.Module):
    """Pre-norm transformer block on (N, D, H, W, C) tokens."""

    def __init__(self, dim: int, *, num_heads: int, window: int, rel_pos: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention3d(dim, num_heads=num_heads, window=window, rel_pos=rel_pos)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed3d(nn.Module):
    """Tokens (N, D/p, H/p, W/p, C) of a volume (N, 1, D, H, W), one per patch of p^3 voxels."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(1, dim, kernel_size=patch, stride=patch)

    def forward(self, volume: Tensor) -> Tensor:
        # Patches do not overlap, so the convolution is one matrix product.
        patches = volume.squeeze(1)
        for axis in (1, 3, 5):
            patches = patches.unflatten(axis, (-1, self.patch))
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ImageEncoder3d(nn.Module):
    """Embedding (N, out_dim, g, g, g) of a volume (N, 1, side, side, side), g = side / 16.

    Source: Kirillov et al. 2023 (SAM) and Wang et al. 2023 (SAM-Med3D), published names.
    """

    def __init__(
        self,
        *,
        side: int,
        dim: int,
        depth: int,
        num_heads: int,
        global_blocks: Sequence[int],
        out_dim: int,
        rel_pos: str,
        patch: int = 16,
        window: int = 14,
    ) -> None:
        super().__init__()
        self.side, grid = side, side // patch
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, grid, dim))
        self.patch_embed = PatchEmbed3d(dim, patch)
        self.blocks = nn.ModuleList(
            Block3d(
                dim,
                num_heads=num_heads,
                window=grid if index in global_blocks else window,
                rel_pos=rel_pos,
            )
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv3d(dim, out_dim, kernel_size=1, bias=False),
            LayerNorm3d(out_dim),
            nn.Conv3d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm3d(out_dim),
        )

    def forward(self, volume: Tensor) -> Tensor:
        if volume.shape[1:] != (1, self.side, self.side, self.side):
            raise ValueError(
                f"image_encoder: wanted a volume (N, 1, {self.side}, {self.side}, {self.side}), "
                f"found {tuple(volume.shape)}"
            )
        x = self.patch_embed(volume) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 4, 1, 2, 3))
