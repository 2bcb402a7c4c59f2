"""U-SAM as a user would write it on the pip package segment_anything: float32, eager, one by one.

The benchmarks measure ours against this; nothing else imports it. Parameters are named as ours,
so that both sides compute with the same weights.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from usam.models.sam_encoder import SAM_SIZES
from usam.models.usam import USam

MEAN, STD = 0.1364736, 0.23238614


class Convolution(nn.Module):
    """3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


def pair(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        Convolution(in_channels, out_channels), Convolution(out_channels, out_channels)
    )


class Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.nConvs = pair(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.nConvs(self.pool(x))


class Up(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.nConvs = pair(2 * channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.nConvs(torch.cat([self.up(x), skip], dim=1))


class Backbone(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inc = Convolution(3, 32)
        self.down1 = Down(32, 64)
        self.down2 = Down(64, 128)
        self.down3 = Down(128, 256)
        self.down4 = Down(256, width)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x1 = self.inc(image)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        return x1, x2, x3, x4, self.down4(x4)


class Decoder(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(2, 256, num_heads=8, mlp_dim=2048)
        self.iou_token = nn.Embedding(1, 256)
        self.mask_tokens = nn.Embedding(32, 256)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(256, 256, 32, 3) for _ in range(32))
        self.up4, self.up3 = Up(256, 128), Up(128, 64)
        self.up2, self.up1 = Up(64, 32), Up(32, 32)
        self.final_output = nn.Sequential(
            nn.Conv2d(32, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, num_classes, kernel_size=1, bias=False),
        )

    def forward(
        self, embedding: Tensor, position: Tensor, sparse: Tensor, dense: Tensor, *, skips: tuple
    ) -> Tensor:
        N, C, h, w = embedding.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).unsqueeze(0)
        tokens = torch.cat([tokens.repeat(N, 1, 1), sparse.repeat(N // len(sparse), 1, 1)], dim=1)
        position = position.repeat(N, 1, 1, 1)
        tokens, image = self.transformer(embedding + dense, position, tokens)
        x1, x2, x3, x4 = skips
        x = self.up4(image.transpose(1, 2).reshape(N, C, h, w), x4)
        x = self.up2(self.up3(x, x3), x2)
        mlps = self.output_hypernetworks_mlps
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(mlps)], dim=1)
        masks = (weights @ x.flatten(2)).view(N, -1, *x.shape[2:])
        return self.final_output(self.up1(masks, x1))


class PlainUSam(nn.Module):
    """The network: image (N, 3, H, W) float in [0, 1] -> logits (N, num_classes, H, W)."""

    def __init__(self, sam_model: str, num_classes: int, img_size: int) -> None:
        super().__init__()
        size, grid = SAM_SIZES[sam_model], img_size // 16
        encoder = ImageEncoderViT(
            img_size=img_size, embed_dim=size.width, depth=size.depth, num_heads=size.num_heads,
            out_chans=256, norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True,
            window_size=14, global_attn_indexes=size.global_blocks,
        )  # fmt: skip
        encoder.patch_embed = nn.Identity()  # tokens come from the convolutions
        self.backbone = Backbone(size.width)
        self.sam = nn.ModuleDict(
            {
                "image_encoder": encoder,
                "prompt_encoder": PromptEncoder(256, (grid, grid), (img_size, img_size), 16),
                "mask_decoder": Decoder(num_classes),
            }
        )

    def forward(self, image: Tensor) -> Tensor:
        *skips, bottleneck = self.backbone((image - MEAN) / STD)
        embedding = self.sam.image_encoder(bottleneck.permute(0, 2, 3, 1))
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=None, masks=None)
        position = self.sam.prompt_encoder.get_dense_pe()
        return self.sam.mask_decoder(embedding, position, sparse, dense, skips=tuple(skips))


def plain_twin(ours: USam, sam_model: str) -> PlainUSam:
    """The plain network with the weights of `ours`, on the same device."""
    plain = PlainUSam(sam_model, ours.num_classes, ours.img_size)
    difference = plain.load_state_dict(ours.state_dict(), strict=False)
    assert not difference.unexpected_keys
    assert all("mask_downscaling" in name for name in difference.missing_keys)
    return plain.to(next(ours.parameters()).device)


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """0.4 cross-entropy + 0.6 Dice, class by class over one-hot planes."""
    probability, dice = torch.softmax(logits, dim=1), 0.0
    for number in range(logits.shape[1]):
        score, truth = probability[:, number], (target == number).float()
        overlap = torch.sum(score * truth)
        size = torch.sum(score * score) + torch.sum(truth * truth)
        dice += 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return 0.4 * F.cross_entropy(logits, target) + 0.6 * dice / logits.shape[1]


def plain_steps(
    model: PlainUSam,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    dtype: torch.dtype | None = None,
) -> float:
    """Train on each batch (image (N, 3, H, W) float32, mask (N, H, W) long), printing's way.

    dtype: what autocast computes in; None for float32. The loss is read after each step.
    """
    model.train()
    device, total = next(model.parameters()).device, 0.0
    for image, mask in batches:
        image, mask = image.to(device), mask.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = plain_loss(model(image), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


@torch.no_grad()
def plain_evaluation(model: PlainUSam, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Dice of each class, from sums kept class by class as floats and read batch by batch."""
    model.eval()
    device, sums = next(model.parameters()).device, {}
    for image, mask in batches:
        image, mask = image.to(device), mask.to(device)
        prediction = torch.argmax(torch.softmax(model(image), dim=1), dim=1)
        for number in range(model.sam.mask_decoder.final_output[-1].out_channels):
            found, truth = prediction == number, mask == number
            both, total = sums.get(number, (0.0, 0.0))
            both += (found & truth).sum().item()
            sums[number] = both, total + found.sum().item() + truth.sum().item()
    return [2 * both / max(total, 1.0) for both, total in sums.values()]
