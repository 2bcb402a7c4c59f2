"""Low-rank adaptation (LoRA) of the queries and values of SAM's encoder, as in SAMed.

usam.model puts it into an encoder; u-sam.py folds it into the weights to evaluate and to predict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 4
PARTS = ("a_q", "b_q", "a_v", "b_v")
NAME = re.compile(r"(.*\bblocks\.(\d+)\.attn\.)lora\.([ab])_([qv])")
TINY_VIT_NAME = re.compile(r".*\blayers\.\d+\.blocks\.")
SAMED_NAME = re.compile(r"w_([ab])_(\d{3})")


class QueryValueLora(nn.Module):
    """LoRA's addition to a fused projection: tokens (..., C) -> (..., 3C), the middle third 0.

    Queries move by b_q a_q x, values by b_v a_v x: a_* (rank, C) start as `nn.Linear` does, b_*
    (C, rank) at 0, so that a new one changes nothing. No scale and no dropout. Both products run
    as one, so that nothing of a queries', keys' and values' size is written twice.
    Source: Hu et al. 2021 (LoRA); Zhang and Liu 2023 (SAMed). No library fits: peft adapts q, k
    and v of a fused projection together, and parametrisations rename `qkv.weight`.
    """

    def __init__(self, dim: int, rank: int = RANK) -> None:
        super().__init__()
        self.a_q, self.a_v = (nn.Parameter(torch.empty(rank, dim)) for _ in "qv")
        self.b_q, self.b_v = (nn.Parameter(torch.zeros(dim, rank)) for _ in "qv")
        for a in (self.a_q, self.a_v):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        down = torch.cat([self.a_q, self.a_v])  # (2 rank, C)
        dim, rank = self.b_q.shape
        up = [
            F.pad(self.b_q, (0, rank)),
            self.b_q.new_zeros(dim, 2 * rank),
            F.pad(self.b_v, (rank, 0)),
        ]
        return F.linear(F.linear(x, down), torch.cat(up))  # up is (3C, 2 rank)


def add_lora(encoder: nn.Module) -> None:
    """Add LoRA to each attention in `encoder` and freeze everything else in it, also the neck."""
    encoder.requires_grad_(False)
    for attention in encoder.attentions:
        attention.lora = QueryValueLora(attention.qkv.in_features)


def is_lora(name: str) -> bool:
    """Whether a tensor of this name is LoRA's."""
    return NAME.fullmatch(name) is not None


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank of the LoRA tensors under our names, where a_* is (rank, C); None without any."""
    ranks = (len(v) for n, v in tensors.items() if ".lora.a_" in n and v.dim() == 2)
    return next(ranks, None)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with LoRA merged into the fused projections; the model computes the same.

    `state` itself is left alone; without LoRA in it, it comes back as it is.
    """
    plain = {name: value for name, value in state.items() if not is_lora(name)}
    for attention in {m[1] for m in map(NAME.fullmatch, state) if m}:
        a_q, b_q, a_v, b_v = (state[f"{attention}lora.{part}"] for part in PARTS)
        tiny_vit, weight = TINY_VIT_NAME.match(attention), plain[f"{attention}qkv.weight"]
        if tiny_vit:  # queries, keys and values of a head lie side by side
            heads = len(state[f"{attention}attention_biases"])
            weight = weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        query, key, value = weight.chunk(3)
        weight = torch.cat([query + b_q @ a_q, key, value + b_v @ a_v])
        if tiny_vit:
            weight = weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        plain[f"{attention}qkv.weight"] = weight
    return plain


def to_samed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA tensors of `state` under SAMed's names: w_a_000 is the first block's q, w_a_001 its v.

    Raises ValueError if there are none.
    """
    found = [(m, value) for name, value in state.items() if (m := NAME.fullmatch(name))]
    if not found:
        raise ValueError("the checkpoint holds no LoRA; it was not trained with --tuning lora")
    if TINY_VIT_NAME.match(found[0][0][1]):
        raise ValueError("SAMed's LoRA files are for SAM's ViT encoders, not for vit_t")
    named = {
        f"w_{match[3]}_{2 * int(match[2]) + (match[4] == 'v'):03d}": value.contiguous()
        for match, value in found
    }
    return dict(sorted(named.items()))


def from_samed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """SAMed's LoRA tensors under our names, which start with `prefix`."""
    found = [(m, value) for name, value in tensors.items() if (m := SAMED_NAME.fullmatch(name))]
    return {
        f"{prefix}blocks.{int(match[2]) // 2}.attn.lora.{match[1]}_{'qv'[int(match[2]) % 2]}": value
        for match, value in found
    }
