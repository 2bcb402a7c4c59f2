"""A model's predictions for all slices, and their pixel counts over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dataset.text import printable
from usam.evaluation.metrics import ClassCounts
from usam.models.prompts import prompts_from_masks
from usam.runtime.loaders import Batch, to_device
from usam.runtime.precision import Precision
from usam.runtime.processes import reduce_sum
from usam.runtime.progress import progress_bar

PROMPT_SOURCES = (  # by prompt mode
    "none",
    "boxes around the true masks",
    "3 points per class in the true masks",
    "3 points per class in the true masks and boxes around them",
)
AlterPrompts = Callable[[dict[str, Any], Batch], dict[str, Any]]


def count_pixels(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    prompt_mode: int,
    precision: Precision,
    points_are_row_col: bool = False,
    alter_prompts: AlterPrompts = lambda prompts, batch: prompts,
    each: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
    require_finite: bool = False,
) -> ClassCounts:
    """Pixel counts of every class over all samples of all processes.

    `model` is the plain module, not its DistributedDataParallel wrapper: shards differ in length.
    `each` is called with every batch of this process and its logits (N, C, H, W). With
    `require_finite` raises ValueError naming the first slice whose logits are not finite.
    """
    counts = ClassCounts(model.num_classes, precision.device)
    slices: list[str] = []
    finite: list[Tensor] = []  # read once at the end: no synchronisation per batch
    batches = predictions(
        model, loader, prompt_mode=prompt_mode, precision=precision,
        points_are_row_col=points_are_row_col, alter_prompts=alter_prompts,
    )  # fmt: skip
    for batch, mask, _, logits in batches:
        counts.update(logits, mask)
        each(batch, logits)
        if require_finite:
            finite.append(logits.isfinite().flatten(1).all(dim=1))
            slices += batch["id"]
    if finite and not (found := torch.cat(finite)).all():
        name = printable(slices[int(found.int().argmin())])
        raise ValueError(f"slice {name}: the model's answer is not finite; check the checkpoint")
    counts.tensors.copy_(reduce_sum(counts.tensors))
    return counts


def predictions(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    prompt_mode: int,
    precision: Precision,
    points_are_row_col: bool = False,
    alter_prompts: AlterPrompts = lambda prompts, batch: prompts,
) -> Iterator[tuple[Batch, Tensor, dict[str, Any], Tensor]]:
    """Each batch with its mask (N, H, W), prompts and logits (N, C, H, W), on the device.

    Prompts come from the masks by the deterministic rule of `prompts_from_masks`, points as (x, y);
    `points_are_row_col` swaps them for a published model, which was trained on swapped ones.
    `alter_prompts` replaces them.
    """
    model.eval()
    for batch in progress_bar(loader, desc="evaluating"):
        image, mask = to_device(batch, precision.device)
        prompts = alter_prompts(prompts_from_masks(mask, model.num_classes, prompt_mode), batch)
        given = dict(prompts)
        if points_are_row_col and prompts["points"] is not None:
            coords, labels = prompts["points"]
            given["points"] = (coords.flip(-1), labels)
        with torch.inference_mode(), precision.autocast():
            logits = model(image, **given)
        yield batch, mask, prompts, logits
