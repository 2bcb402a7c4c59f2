"""Prompts drawn from masks: boxes and points for U-SAM, clicks for SAM-Med3D.

The engine asks for them each step; they are computed on the masks' device, without waiting for
it, from random numbers of a CPU generator, so that every device draws the same prompts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from usam.cli.choices import PROMPT_MODES


def prompts_from_masks(
    mask: Tensor, num_classes: int, mode: int, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Keyword arguments for the model: `points` and `boxes`, None if the mode has none.

    mask (N, H, W) integer in [0, num_classes); mode a key of PROMPT_MODES. With a CPU generator
    the prompts are random (training), without one fixed (evaluation).
    Raises ValueError for an unknown mode.
    """
    if mode not in PROMPT_MODES:
        raise ValueError(f"prompt mode {mode} is unknown; choose one of {sorted(PROMPT_MODES)}")
    points = points_from_masks(mask, num_classes, generator=generator) if mode in (2, 3) else None
    boxes = boxes_from_masks(mask, generator=generator) if mode in (1, 3) else None
    return {"points": points, "boxes": boxes}


def mixed_mode(generator: torch.Generator) -> int:
    """A random key of PROMPT_MODES, all equally likely, for a step of `--prompt_mode mixed`."""
    return int(torch.randint(len(PROMPT_MODES), (), generator=generator))


def jittered(
    prompts: dict[str, Any], pixels: float, img_size: int, generator: torch.Generator
) -> dict[str, Any]:
    """`prompts` with each coordinate shifted uniformly at random by up to `pixels` either way.

    prompts: keyword arguments of the model, as `prompts_from_masks` gives them; generator: a CPU
    one. Points stay in the image and keep their labels even where they leave their object; points
    that are none stay at 0. Each side of a box moves by itself; boxes stay in the image, and one
    pixel wide at least.
    """
    points, boxes = prompts["points"], prompts["boxes"]
    if points is not None:
        coords, labels = points
        moved = (coords + _offsets(coords, pixels, generator)).clamp(0, img_size - 1)
        points = (moved.where(labels.unsqueeze(-1) >= 0, coords), labels)
    if boxes is not None:
        low, high = (boxes + _offsets(boxes, pixels, generator)).view(-1, 2, 2).unbind(dim=1)
        low, high = low.minimum(high).clamp(0, img_size - 1), high.maximum(low)
        boxes = torch.cat([low, high.clamp(max=img_size).maximum(low + 1)], dim=1)
    return {"points": points, "boxes": boxes}


def _offsets(values: Tensor, pixels: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(values.shape, generator=generator) * 2 - 1
    return _to_device(drawn * pixels, values.device)


def boxes_from_masks(
    mask: Tensor,
    *,
    margin: int = 2,
    generator: torch.Generator | None = None,
    max_margin: int = 4,
) -> Tensor:
    """One box around everything labelled, as (N, 4) float pixels (x1, y1, x2, y2).

    mask (N, H, W) integer, 0 is background. First and last labelled column and row, moved
    outwards by `margin` pixels, or with a CPU generator by 0 to `max_margin` pixels drawn for
    each side; clamped to [0, W] and [0, H]. An empty mask gives the whole image.
    """
    height, width = mask.shape[-2:]
    labelled = mask > 0
    x1, x2 = _first_and_last(labelled.any(dim=1))
    y1, y2 = _first_and_last(labelled.any(dim=2))
    if generator is None:
        grow = torch.full((4,), margin, device=mask.device)
    else:
        grow = torch.randint(max_margin + 1, (mask.shape[0], 4), generator=generator)
        grow = _to_device(grow, mask.device)
    sign = torch.tensor([-1, -1, 1, 1])
    limit = torch.tensor([width, height, width, height])
    box = torch.stack([x1, y1, x2, y2], dim=1) + grow * _to_device(sign, mask.device)
    box = box.clamp(min=0).minimum(_to_device(limit, mask.device))
    whole = _to_device(torch.tensor([0, 0, width, height]), mask.device)
    return box.where(labelled.flatten(1).any(dim=1, keepdim=True), whole).float()


def points_from_masks(
    mask: Tensor,
    num_classes: int,
    *,
    points_per_class: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Points in every foreground class: coordinates (N, P, 2) float pixels (x, y), labels (N, P).

    mask (N, H, W) integer in [0, num_classes); P = points_per_class * (num_classes - 1), class 1
    first. With a CPU generator each point is any pixel of its class with equal chance, drawn
    with replacement, so that one pixel is enough. Without one, points are spread in row-major
    order as in the published evaluation: at 0, 4 and 8 tenths (for 3 points) of the class.
    Labels are 1, or -1 (SAM's not-a-point) at coordinates 0 for a class the mask does not hold.
    """
    num_images, height, width = mask.shape
    classes = torch.arange(1, num_classes, device=mask.device).view(-1, 1, 1)
    region = (mask.unsqueeze(1) == classes).flatten(0, 1)  # (N * (C - 1), H, W)
    count = region.sum(dim=(1, 2)).unsqueeze(1)  # (N * (C - 1), 1)
    if generator is None:
        tenths = torch.arange(points_per_class, device=mask.device) * 12 // points_per_class
        rank = (tenths * (count // 10)).minimum((count - 1).clamp(min=0))
    else:
        rank = _draw_ranks(count, points_per_class, generator)
    index = _true_of_rank(region, rank)
    coords = torch.stack([index % width, index // width], dim=-1)  # (x, y)
    present = (count > 0).expand_as(index)
    coords = coords.where(present.unsqueeze(-1), 0)
    labels = present.long() * 2 - 1
    return coords.float().reshape(num_images, -1, 2), labels.reshape(num_images, -1)


def next_clicks(
    logits: Tensor, mask: Tensor, generator: torch.Generator, *, threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The next click of a simulated user, one per sample: coords (N, 1, 3), labels (N, 1).

    logits (N, 1, D, H, W) float, the previous prediction, object above `threshold` (all zero
    before the first click); mask (N, 1, D, H, W) or (N, D, H, W), object above 0.
    Coordinates are float voxels along axes (0, 1, 2) of the volume; labels 1 in the object and
    0 outside, always true to the mask. Drawn with equal chance from all wrongly predicted
    voxels; from the object if none is wrong; from the whole volume (so label 0) if there is no
    object either. Raises ValueError if shapes differ.
    """
    region, inside = _click_region(logits, mask, threshold)
    planes = region.flatten(2)  # (N, D, H * W)
    rank = _draw_ranks(planes.sum(dim=(1, 2)).unsqueeze(1), 1, generator)
    return _click_at(_true_of_rank(planes, rank), inside)


def largest_error_click(
    logits: Tensor, mask: Tensor, *, threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The click of a simulated user at the centre of the largest error; not random.

    Arguments and results as in `next_clicks`. Errors are ranked as in Sofiiuk et al. 2021
    (RITM): the click is the voxel of the missed or of the added region that lies deepest in it,
    by Euclidean distance to the region's outside; the first in row-major order of equals.
    For evaluation: it reads the device back and takes the CPU half a second a volume.
    """
    region, inside = _click_region(logits, mask, threshold)
    depth = _squared_depth(region & inside).maximum(_squared_depth(region & ~inside))
    return _click_at(depth.flatten(1).argmax(dim=1, keepdim=True), inside)


def _click_region(logits: Tensor, mask: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Voxels to click and voxels of the object, both (N, D, H, W) bool."""
    inside = (mask.squeeze(1) if mask.dim() == 5 else mask) > 0
    if logits.dim() != 5 or logits[:, 0].shape != inside.shape:
        raise ValueError(
            f"clicks need logits (N, 1, D, H, W) and a mask of that size, "
            f"found {tuple(logits.shape)} and {tuple(mask.shape)}"
        )
    wrong = (logits[:, 0] > threshold) != inside
    any_wrong = wrong.flatten(1).any(dim=1).view(-1, 1, 1, 1)
    any_inside = inside.flatten(1).any(dim=1).view(-1, 1, 1, 1)
    return wrong | ~any_wrong & (inside | ~any_inside), inside


def _click_at(index: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (N, 1, 3) and labels (N, 1) of flat voxel indices (N, 1)."""
    _, height, width = inside.shape[1:]
    labels = inside.flatten(1).gather(1, index).long()
    coords = [index // (height * width), index // width % height, index % width]
    return torch.stack(coords, dim=-1).float(), labels


def _first_and_last(line: Tensor) -> tuple[Tensor, Tensor]:
    """First and last true index (N,) of each row of `line` (N, L) bool."""
    line = line.to(torch.uint8)  # argmax takes no bool; of equals it gives the first
    return line.argmax(dim=1), line.shape[1] - 1 - line.flip(1).argmax(dim=1)


def _draw_ranks(count: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` random integers in [0, count) per row, for count (M, 1) long; 0 if count is 0."""
    # Integers this large make the bias of the remainder vanish and are exact on every device.
    keys = torch.randint(2**62, (count.shape[0], number), generator=generator)
    return _to_device(keys, count.device) % count.clamp(min=1)


def _true_of_rank(region: Tensor, rank: Tensor) -> Tensor:
    """Flat index (M, K) of the rank-th true element, row-major, of region (M, R, S) bool.

    rank (M, K) long counts from 0. The line holding it is found first, then the place in the
    line, so that no cumulative count of the whole region is ever stored.
    """
    upto = region.sum(dim=2).cumsum(dim=1)  # (M, R)
    lines, length = region.shape[1:]
    line = (upto.unsqueeze(1) <= rank.unsqueeze(2)).sum(dim=2).clamp(max=lines - 1)  # (M, K)
    before = F.pad(upto, (1, 0)).gather(1, line)
    chosen = region.gather(1, line.unsqueeze(2).expand(-1, -1, length))  # (M, K, S)
    within = (chosen.cumsum(dim=2) <= (rank - before).unsqueeze(2)).sum(dim=2)
    return line * length + within.clamp(max=length - 1)


def _squared_depth(region: Tensor) -> Tensor:
    """Squared distance (int32) of each voxel to the nearest one outside region (N, D, H, W) bool.

    Beyond the border counts as outside. Exact: the lower envelope of parabolas (Felzenszwalb and
    Huttenlocher 2012), one axis after the other, by shifts as far as any depth reaches.
    """
    square = F.pad(region, [1] * 6).int() * 4 * max(region.shape[1:]) ** 2
    for axis in (1, 2, 3):
        line = square.transpose(axis, -1)
        nearest, step = line.clone(), 1
        while step**2 < nearest.max():
            behind, ahead = line[..., :-step] + step**2, line[..., step:] + step**2
            nearest[..., step:] = nearest[..., step:].minimum(behind)
            nearest[..., :-step] = nearest[..., :-step].minimum(ahead)
            step += 1
        square = nearest.transpose(axis, -1)
    return square[:, 1:-1, 1:-1, 1:-1]


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """CPU values copied to the device, without waiting if that is safe (CUDA stages the copy)."""
    return values.to(device, non_blocking=device.type == "cuda")
