"""SAM's image encoder as a TinyViT: convolutions, then windowed attention; MobileSAM's names.

The encoder of LiteMedSAM (`stride` 4) and of MobileSAM (`stride` 16).
Source: Wu et al. 2022 (TinyViT); Zhang et al. 2023 (MobileSAM); Ma et al. 2024 (MedSAM).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn

from usam.models.sam_encoder import PROMPT_WIDTH

STRIDES = (4, 16)  # pixels of the image to a cell of the embedding: LiteMedSAM, MobileSAM
WIDTHS = (64, 128, 160, 320)  # channels of the four stages
DEPTHS = (2, 2, 6, 2)  # blocks of each stage
HEAD_WIDTH = 32
WINDOWS = (7, 14, 7)  # of the three stages with attention, in tokens
EXPANSION = 4


class ConvNorm(nn.Sequential):
    """Convolution without bias, then BatchNorm: (N, C_in, H, W) -> (N, C_out, H', W')."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.add_module("c", conv)
        self.add_module("bn", nn.BatchNorm2d(out_channels))


class PatchEmbed(nn.Module):
    """Image (N, 3, H, W) -> (N, 64, H / s, W / s): s is 1 for LiteMedSAM and 4 for MobileSAM."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        kernel, step = (1, 1) if stride == 4 else (3, 2)
        self.seq = nn.Sequential(
            ConvNorm(3, width // 2, kernel, step),
            nn.GELU(),
            ConvNorm(width // 2, width, kernel, step),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.seq(image)


class InvertedBottleneck(nn.Module):
    """MBConv: expansion, depthwise 3x3 convolution, projection, and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = EXPANSION * width
        self.conv1 = ConvNorm(width, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class Merge(nn.Module):
    """Downsampling between two stages: (N, C, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, out_width)
        self.conv2 = ConvNorm(out_width, out_width, 3, stride, groups=out_width)
        self.conv3 = ConvNorm(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Multi-head attention within windows: (B, w, w, C) -> the same.

    A learned bias for each head depends on how many rows and columns two tokens are apart.
    `lora`, where there is one, adds to queries and values (`usam.models.lora`).
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(self.num_heads, window**2))
        self.lora: nn.Module | None = None
        row, column = torch.arange(window**2) // window, torch.arange(window**2) % window
        apart = (row[:, None] - row).abs() * window + (column[:, None] - column).abs()
        self.register_buffer("apart", apart, persistent=False)  # (w * w, w * w)

    def forward(self, x: Tensor) -> Tensor:
        B, side, _, width = x.shape
        x = self.norm(x).reshape(B, side * side, width)
        qkv = self.qkv(x).unflatten(-1, (self.num_heads, 3, HEAD_WIDTH))
        if self.lora is not None:  # queries, keys, values one after the other; here by head
            added = self.lora(x).unflatten(-1, (3, self.num_heads, HEAD_WIDTH))
            qkv = qkv + added.transpose(2, 3)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # each (B, heads, w * w, 32)
        bias = self.attention_biases[:, self.apart].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(B, side, side, width))


class FeedForward(nn.Module):
    """LayerNorm and two layers: (..., C) -> (..., C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, EXPANSION * width)
        self.fc2 = nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyVitBlock(nn.Module):
    """Windowed attention, a depthwise 3x3 convolution and an MLP: (N, C, H, W) -> the same.

    As published, a grid that is no multiple of the window is padded with zeros before the norm,
    and the padding takes part in the attention.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        windows, padded = window_partition(tokens, self.window)
        attended = window_unpartition(self.attn(windows), self.window, padded, tokens.shape[1:3])
        tokens = tokens + attended
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (tokens + self.mlp(tokens)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one width, followed by downsampling except in the last stage."""

    def __init__(self, index: int) -> None:
        super().__init__()
        width, last = WIDTHS[index], index == len(WIDTHS) - 1
        self.blocks = nn.ModuleList(
            TinyVitBlock(width, WINDOWS[index - 1]) if index else InvertedBottleneck(width)
            for _ in range(DEPTHS[index])
        )
        # As in MobileSAM the third merge keeps the size, which TinyViT for ImageNet halves.
        self.downsample = None if last else Merge(width, WIDTHS[index + 1], 1 if index == 2 else 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyVit(nn.Module):
    """Image (N, 3, S, S) -> embedding (N, 256, S / stride, S / stride).

    S is any multiple of `stride`, one of STRIDES; there is no embedding of absolute positions.
    While nothing of it but LoRA is trained, its BatchNorm keeps the statistics it has, so that an
    image's embedding is the same in every batch. Raises ValueError for another stride.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        if stride not in STRIDES:
            raise ValueError(f"stride must be one of {STRIDES}, found {stride}")
        self.stride = stride
        self.patch_embed = PatchEmbed(WIDTHS[0], stride)
        self.layers = nn.ModuleList(Stage(index) for index in range(len(WIDTHS)))
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], PROMPT_WIDTH, kernel_size=1, bias=False),
            LayerNorm2d(PROMPT_WIDTH),
            nn.Conv2d(PROMPT_WIDTH, PROMPT_WIDTH, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(PROMPT_WIDTH),
        )

    @property
    def attentions(self) -> list[WindowAttention]:
        """The attention of every block that has one, first to last."""
        return [block.attn for layer in list(self.layers)[1:] for block in layer.blocks]

    def train(self, mode: bool = True) -> TinyVit:
        """Switch to training mode; BatchNorm layers with frozen weights stay in evaluation mode."""
        frozen = not self.neck[0].weight.requires_grad
        return super().train(mode and not frozen)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)
