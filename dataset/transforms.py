"""The augmentations of training, batched on whatever device the batch lies on.

The training step calls `augment`; nothing else in the project turns or flips a slice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ANGLE = 20.0  # degrees


class Draws(NamedTuple):
    """What happens to each of N samples; tensors on the CPU."""

    quarters: Tensor  # (N,) long in 0..3: quarter turns, as torch.rot90 turns
    flip: Tensor  # (N,) long: 0 up-down, 1 left-right, -1 none; after the turn
    angle: Tensor  # (N,) float degrees, 0 = not rotated


def draw(num_samples: int, generator: torch.Generator) -> Draws:
    """Augmentations of `num_samples` samples from a CPU generator, five numbers a sample.

    Half of the samples get quarter turns and a flip on a random axis; of the others, half are
    rotated by up to 20 degrees. Source: the published U-SAM training (from TransUNet's).
    """
    chance = torch.rand(num_samples, 5, generator=generator)
    turned = chance[:, 0] < 0.5
    rotated = ~turned & (chance[:, 1] < 0.5)
    quarters = (chance[:, 2] * 4).long().clamp(max=3) * turned
    flip = torch.where(turned, (chance[:, 3] * 2).long().clamp(max=1), -1)
    angle = (chance[:, 4] * 2 - 1) * MAX_ANGLE * rotated
    return Draws(quarters, flip, angle)


def augment(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch as drawn by `draw`: image and mask of each sample move together.

    image (N, C, H, W) float in [0, 1], mask (N, H, W) long, on one device, H = W; the generator is
    a CPU one. Raises ValueError for slices that are not square.
    """
    return apply(image, mask, draw(len(image), generator))


def apply(image: Tensor, mask: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Image (N, C, H, W) and mask (N, H, W) after the turns, flips and rotations of `draws`.

    Turns and flips only move pixels. Rotations are bilinear for the image and nearest for the
    mask; what comes in from outside is 0 (air, background).
    """
    if image.shape[-2:] != mask.shape[-2:] or image.shape[-1] != image.shape[-2]:
        raise ValueError(f"augment: square slices wanted, found {tuple(image.shape[-2:])}")
    image, mask = _permute(image, mask, draws)
    rotated = draws.angle.nonzero().flatten()  # on the CPU: no host sync
    if len(rotated):
        index = rotated.to(image.device, non_blocking=True)
        turned = _rotate(image[index], mask[index], draws.angle[rotated])
        image = image.index_copy(0, index, turned[0])
        mask = mask.index_copy(0, index, turned[1])
    return image, mask


def _permute(image: Tensor, mask: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Quarter turns and flips by integer source places, exact on every device."""
    size = image.shape[-1]
    source = torch.stack([_inverse(int(q), int(f)) for q, f in zip(*draws[:2], strict=True)])
    stride = source[:, 0] * size + source[:, 1]  # (N, 2): steps in memory per target row and column
    start = ((size - 1) * (size + 1 - stride.sum(1))) // 2  # the source of the target's (0, 0)
    stride, start = (t.to(image.device, non_blocking=True) for t in (stride, start))
    place = torch.arange(size, device=image.device)
    rows = start[:, None] + stride[:, :1] * place  # (N, H)
    flat = (rows[:, :, None] + (stride[:, 1:] * place)[:, None]).flatten(1)  # (N, H * W)
    planes = flat[:, None].expand(-1, image.shape[1], -1)
    image = image.flatten(2).gather(2, planes).view_as(image)
    return image, mask.flatten(1).gather(1, flat).view_as(mask)


def _inverse(quarters: int, flip: int) -> Tensor:
    """(2, 2) long: the centred (y, x) a target pixel's value comes from, given its own (y, x)."""
    turn = torch.linalg.matrix_power(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), quarters).long()
    mirror = torch.tensor([-1 if flip == 0 else 1, -1 if flip == 1 else 1])
    return turn * mirror  # target -> before the flip (columns scaled) -> before the turn


def _rotate(image: Tensor, mask: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    radians = angle * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    theta = theta.to(image.device, non_blocking=True)
    grid = F.affine_grid(theta, [len(angle), 1, *mask.shape[1:]], align_corners=False)
    turned = F.grid_sample(image.float(), grid, mode="bilinear", align_corners=False)
    labels = F.grid_sample(mask[:, None].float(), grid, mode="nearest", align_corners=False)
    return turned.to(image.dtype), labels[:, 0].to(mask.dtype)
