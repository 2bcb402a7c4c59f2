"""Dice and IoU of two objects, and of label maps pooled over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def overlap(shared: Any, predicted: Any, true: Any) -> tuple[Any, Any]:
    """Dice and IoU of two objects from their numbers of common, predicted and true voxels.

    Numbers, or tensors of them. At least one of the objects must have a voxel.
    """
    return 2 * shared / (predicted + true), shared / (predicted + true - shared)


class ClassCounts:
    """Pixels by true and predicted class, summed over all updates without waiting for the device.

    `tensors` (2, C, C) int64 holds two confusion matrices, row = true class, column = predicted
    class: over all samples, and over those with anything but background in their truth (as the
    published code evaluates). Sums are exact, so the order and size of batches and the number of
    processes change nothing; one all-reduce (sum) of `tensors` joins processes.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.tensors = torch.zeros(2, num_classes, num_classes, dtype=torch.int64, device=device)

    @property
    def tensor(self) -> Tensor:
        """The confusion matrix (C, C) over all samples."""
        return self.tensors[0]

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        prediction: logits (N, C, *S) float, or a label map (N, *S) integer in [0, C);
        target (N, *S) integer in [0, C). Raises ValueError if sizes or classes differ.
        """
        if prediction.dim() == target.dim() + 1 and prediction.shape[1] == self.num_classes:
            prediction = prediction.argmax(dim=1)
        if prediction.shape != target.shape:
            raise ValueError(
                f"wanted logits (N, {self.num_classes}, *S) or labels (N, *S) for a target "
                f"{tuple(target.shape)}, found {tuple(prediction.shape)}"
            )
        if target.numel() == 0:
            return
        width = target.shape[-1]
        pairs = (target.long() * self.num_classes + prediction).reshape(-1, width)
        # torch.bincount reads its maximum back from a GPU. A histogram a row of pixels needs
        # no such wait and keeps the many additions from meeting in the same few numbers.
        rows = pairs.new_zeros(pairs.shape[0], self.num_classes**2, dtype=torch.int32)
        rows.scatter_add_(1, pairs, rows.new_ones(1, 1).expand_as(pairs))
        samples = rows.view(len(target), -1, *self.tensor.shape).sum(dim=1)  # (N, C, C)
        has_foreground = samples[:, 1:].sum(dim=(1, 2)) > 0
        self.tensors[0] += samples.sum(dim=0)
        self.tensors[1] += (samples * has_foreground.view(-1, 1, 1)).sum(dim=0)

    def summary(
        self, class_names: Sequence[str], *, foreground_only: bool = False
    ) -> dict[str, Any]:
        """Pooled Dice and IoU per class and their means, as strict JSON (None, never NaN).

        class_names: one a class, background first. foreground_only leaves out samples whose truth
        is all background. Gives
        {"dice": {name: float | None}, "iou": {name: float | None}, "mean_dice": float | None,
        "mean_iou": float | None, "absent": [names]}. A class neither labelled nor predicted
        anywhere is None and absent; the means leave out such classes and the background, and
        are None when nothing remains. Raises ValueError if the number of names is wrong.
        """
        if len(class_names) != self.num_classes:
            raise ValueError(
                f"wanted {self.num_classes} class names, found {len(class_names)}: "
                f"{', '.join(class_names)}"
            )
        matrix = self.tensors[int(foreground_only)].cpu()
        shared = matrix.diagonal().tolist()
        predicted, true = matrix.sum(dim=0).tolist(), matrix.sum(dim=1).tolist()
        scores = [
            overlap(*sizes) if any(sizes) else (None, None)
            for sizes in zip(shared, predicted, true, strict=True)
        ]
        dice, iou = zip(*scores, strict=True)
        names = distinct(class_names)
        return {
            "dice": dict(zip(names, dice, strict=True)),
            "iou": dict(zip(names, iou, strict=True)),
            "mean_dice": _mean(dice[1:]),
            "mean_iou": _mean(iou[1:]),
            "absent": [name for name, score in zip(names, dice, strict=True) if score is None],
        }


def distinct(class_names: Sequence[str]) -> list[str]:
    """The class names; repeated names get their class id, so that no score is lost."""
    return [
        f"{name} (class {number})" if class_names.count(name) > 1 else name
        for number, name in enumerate(class_names)
    ]


def rank_score(score: float | None) -> float:
    """A score as a number for comparisons: None and NaN rank below every finite number."""
    return -math.inf if score is None or math.isnan(score) else float(score)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
