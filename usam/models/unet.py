"""The convolutional paths of U-SAM: down from the image to SAM's token grid and back up.

usam.model joins them to SAM's encoder and decoder; names are those of the published code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIP_WIDTHS = (32, 64, 128, 256)  # channels at 1/1, 1/2, 1/4, 1/8


def conv_norm_relu(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Convolution, BatchNorm and ReLU, in a single pass over the image when nothing is trained.

    The fixed scale and shift of BatchNorm then go into the convolution's small weights (torch's
    fuse_conv_bn_weights makes Parameters, which would break the graph of torch.compile).
    """
    if norm.training or torch.is_grad_enabled():
        return norm(conv(x)).relu()
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale[:, None, None, None]
    bias = (conv.bias - norm.running_mean) * scale + norm.bias
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups).relu_()


class ConvNormReLU(nn.Module):
    """3x3 convolution, BatchNorm, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_relu(self.conv, self.norm, x)


def two_convolutions(in_channels: int, out_channels: int) -> nn.Sequential:
    """The two convolutions of each level."""
    return nn.Sequential(
        ConvNormReLU(in_channels, out_channels), ConvNormReLU(out_channels, out_channels)
    )


class DownBlock(nn.Module):
    """Halves the size, then two convolutions: (N, C_in, H, W) -> (N, C_out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.nConvs = two_convolutions(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.nConvs(self.pool(x))


class DownPath(nn.Module):
    """Image (N, 3, H, W) -> skips at 1/1, 1/2, 1/4, 1/8 and a bottleneck at 1/16.

    The skips have 32, 64, 128 and 256 channels, the bottleneck `width`: SAM's token width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inc = ConvNormReLU(3, SKIP_WIDTHS[0])
        self.down1 = DownBlock(SKIP_WIDTHS[0], SKIP_WIDTHS[1])
        self.down2 = DownBlock(SKIP_WIDTHS[1], SKIP_WIDTHS[2])
        self.down3 = DownBlock(SKIP_WIDTHS[2], SKIP_WIDTHS[3])
        self.down4 = DownBlock(SKIP_WIDTHS[3], width)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        skips = [self.inc(image)]
        for down in (self.down1, self.down2, self.down3):
            skips.append(down(skips[-1]))
        return skips, self.down4(skips[-1])


class SkipPath(nn.Module):
    """Image (N, 3, H, W) -> (skips at 1/1, 1/2, 1/4 and, for stride 16, 1/8; None).

    The down path of an encoder that sees the image itself and needs no bottleneck.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.inc = ConvNormReLU(3, SKIP_WIDTHS[0])
        self.down1 = DownBlock(SKIP_WIDTHS[0], SKIP_WIDTHS[1])
        self.down2 = DownBlock(SKIP_WIDTHS[1], SKIP_WIDTHS[2])
        self.down3 = DownBlock(SKIP_WIDTHS[2], SKIP_WIDTHS[3]) if stride == 16 else None

    def forward(self, image: Tensor) -> tuple[list[Tensor], None]:
        skips = [self.inc(image)]
        for down in (self.down1, self.down2, self.down3):
            if down is not None:
                skips.append(down(skips[-1]))
        return skips, None


class UpBlock(nn.Module):
    """Doubles the size, joins the skip, two convolutions: (N, C, h, w) -> (N, C_out, 2h, 2w)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.nConvs = two_convolutions(2 * channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.nConvs(torch.cat([self.up(x), skip], dim=1))
