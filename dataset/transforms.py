"""Training augmentations, computed in batches on the batch's device.

The training step calls `augment`; nothing else in the project turns or flips a slice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ANGLE = 20.0  # degrees

# The preset "strong"; each change happens to a sample with its own chance of STRONG_SHARE.
STRONG_SHARE = 0.5
MAX_STRONG_ANGLE = 15.0  # degrees
MAX_SCALE = 1.25  # and its inverse
MAX_SHIFT = 0.1  # of the side, along each axis
MAX_GAMMA = 1.4  # and its inverse
MAX_NOISE = 0.06  # standard deviation, of images in [0, 1]


class Draws(NamedTuple):
    """The random draws for N samples; tensors on the CPU."""

    quarters: Tensor  # (N,) long in 0..3: quarter turns, as torch.rot90 turns
    flip: Tensor  # (N,) long: 0 up-down, 1 left-right, -1 none; after the turn
    angle: Tensor  # (N,) float degrees, 0 = not rotated


def draw(num_samples: int, generator: torch.Generator) -> Draws:
    """Augmentations of `num_samples` samples from a CPU generator, five numbers per sample.

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


def augment(
    image: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    *,
    mirrored_ids: Tensor | None = None,
    flips: bool = True,
) -> tuple[Tensor, Tensor]:
    """A batch as drawn by `draw`: image and mask of each sample move together.

    image (N, C, H, W) float in [0, 1], mask (N, H, W) long, on one device, H = W; the generator is
    a CPU one. mirrored_ids (C,) long, on that device: the ids that classes take in flipped samples.
    Without `flips` the same samples are drawn and not flipped. Raises ValueError for slices that
    are not square.
    """
    draws = draw(len(image), generator)
    if not flips:
        draws = draws._replace(flip=torch.full_like(draws.flip, -1))
    image, mask = apply(image, mask, draws)
    if mirrored_ids is not None:
        flipped = (draws.flip >= 0).to(mask.device, non_blocking=True)
        mask = torch.where(flipped[:, None, None], mirrored_ids[mask], mask)
    return image, mask


class StrongDraws(NamedTuple):
    """The random draws of `--augment strong` for N samples; tensors on the CPU."""

    angle: Tensor  # (N,) float degrees, clockwise as shown
    scale: Tensor  # (N,) float, above 1 enlarges
    shift: Tensor  # (N, 2) float (x, y), of the side
    gamma: Tensor  # (N,) float
    noise: Tensor  # (N,) float, standard deviation
    seed: int  # of the noise's values


def draw_strong(num_samples: int, generator: torch.Generator) -> StrongDraws:
    """The draws of the preset "strong" from a CPU generator; see the constants for their ranges.

    No turns and no flips: prepared slices lie one way, and left is not right in a patient.
    """
    chance, value = torch.rand(2, num_samples, 6, generator=generator)
    chance[:, 3] = chance[:, 2]  # shifted along both axes or none
    value = (value * 2 - 1) * (chance < STRONG_SHARE)  # 0: unchanged
    return StrongDraws(
        angle=value[:, 0] * MAX_STRONG_ANGLE,
        scale=MAX_SCALE ** value[:, 1],
        shift=value[:, 2:4] * MAX_SHIFT,
        gamma=MAX_GAMMA ** value[:, 4],
        noise=value[:, 5].abs() * MAX_NOISE,
        seed=int(torch.randint(2**62, (), generator=generator)),
    )


def augment_strongly(
    image: Tensor, mask: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch turned, scaled and shifted a little, its contrast and noise changed.

    Arguments and errors as in `augment`; all channels of a sample change alike but for the noise.
    """
    return apply_strong(image, mask, draw_strong(len(image), generator))


def apply_strong(image: Tensor, mask: Tensor, draws: StrongDraws) -> tuple[Tensor, Tensor]:
    """Image (N, C, H, W) and mask (N, H, W) after `draws`: one warp, gamma, then white noise.

    The noise comes from a generator of the images' device: another device draws other values.
    """
    _check_square(image, mask)
    radians = draws.angle * (math.pi / 180)
    cos, sin = radians.cos() / draws.scale, radians.sin() / draws.scale
    x, y = (-2 * draws.shift).unbind(dim=1)  # the grid's frame is 2 wide; it says where from
    theta = torch.stack([cos, sin, cos * x + sin * y, -sin, cos, cos * y - sin * x], dim=1)
    image, mask = _warp(image, mask, theta.view(-1, 2, 3))
    per_sample = torch.stack([draws.gamma, draws.noise]).view(2, -1, 1, 1, 1)
    gamma, noise = per_sample.to(image.device, non_blocking=True)
    generator = torch.Generator(image.device).manual_seed(draws.seed)
    drawn = torch.randn(image.shape, generator=generator, device=image.device)
    return (image.clamp(min=0) ** gamma + noise * drawn).clamp(0, 1), mask


def apply(image: Tensor, mask: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Image (N, C, H, W) and mask (N, H, W) after the turns, flips and rotations of `draws`.

    Turns and flips only move pixels. Rotations are bilinear for the image and nearest for the
    mask; what comes in from outside is 0 (air, background).
    """
    _check_square(image, mask)
    image, mask = _permute(image, mask, draws)
    rotated = draws.angle.nonzero().flatten()  # on the CPU: no host sync
    if len(rotated):
        index = rotated.to(image.device, non_blocking=True)
        turned = _rotate(image[index], mask[index], draws.angle[rotated])
        image = image.index_copy(0, index, turned[0])
        mask = mask.index_copy(0, index, turned[1])
    return image, mask


def _check_square(image: Tensor, mask: Tensor) -> None:
    if image.shape[-2:] != mask.shape[-2:] or image.shape[-1] != image.shape[-2]:
        raise ValueError(f"augment: expected square slices, found {tuple(image.shape[-2:])}")


def _permute(image: Tensor, mask: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Quarter turns and flips by integer indexing, exact on every device."""
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
    """(2, 2) long: maps a target pixel's centred (y, x) to that of its source."""
    turn = torch.linalg.matrix_power(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), quarters).long()
    mirror = torch.tensor([-1 if flip == 0 else 1, -1 if flip == 1 else 1])
    return turn * mirror  # target -> before the flip (columns scaled) -> before the turn


def _rotate(image: Tensor, mask: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    radians = angle * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    return _warp(image, mask, theta)


def _warp(image: Tensor, mask: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Image and mask warped by maps theta (N, 2, 3), on the CPU, from target to source positions.

    Bilinear and nearest; places are (x, y) from -1 to 1. What comes in from outside is 0.
    """
    theta = theta.to(image.device, non_blocking=True)
    grid = F.affine_grid(theta, [len(theta), 1, *mask.shape[1:]], align_corners=False)
    turned = F.grid_sample(image.float(), grid, mode="bilinear", align_corners=False)
    labels = F.grid_sample(mask[:, None].float(), grid, mode="nearest", align_corners=False)
    return turned.to(image.dtype), labels[:, 0].to(mask.dtype)


def unchanged(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The batch as it is; arguments as in `augment`."""
    return image, mask


AUGMENTATIONS = {  # by --augment
    "published": augment,
    "strong": augment_strongly,
    "none": unchanged,
}
