"""Scores by case: slices are collected into cases at their stored size, and each case is scored."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset import SliceDataset
from dataset.palette import class_colors
from usam.evaluation.case_metrics import Part, Row, mean_row, score_case
from usam.evaluation.metrics import ClassCounts
from usam.evaluation.pixels import count_pixels
from usam.prediction.slices import to_native
from usam.runtime.figures import save_overlay
from usam.runtime.loaders import Batch, loader_for
from usam.runtime.processes import gather_texts
from usam.runtime.samplers import CaseShard

NUM_WORST = 6  # number of cases with a picture
MIN_SHOWN = 64  # smallest side of these pictures, in pixels
Spacing = tuple[float, float, float]


class Worst(NamedTuple):
    """A case's mean Dice and its slice with the most wrong pixels."""

    dice: float
    case: str
    slice_name: str
    image: np.ndarray
    masks: dict[str, np.ndarray]


@dataclass(frozen=True)
class CaseScores:
    """All cases of an evaluation: their rows by case (see `score_case`) and number of slices.

    in_mm: whether distances are in mm and volumes in ml, else in pixels and voxels. worst: by case,
    worst first, {"case", "slice", "dice", "png": base64}.
    """

    rows: dict[str, list[Row]]
    num_slices: dict[str, int]
    in_mm: bool
    worst: list[dict[str, Any]]


def known_spacings(data: SliceDataset, given: Spacing | None) -> list[Spacing] | None:
    """The spacing (z, y, x) in mm of each case in the store; None if no evaluated case has one.

    given: in place of what the store does not say. Raises ValueError where it says it for all, or
    where it says it for some only and none is given.
    """
    used = {number for number, _ in data.slices}
    missing = {number for number in used if data.store.cases[number]["spacing"] is None}
    if given and not missing:
        stored = data.store.cases[min(used)]["spacing"]
        raise ValueError(f"--spacing: the store has its own, {stored}; leave it out")
    if missing and not given:
        if missing != used:
            raise ValueError(
                f"case {data.store.cases[min(missing)]['id']} has no spacing, others have theirs; "
                "give --spacing Z Y X in mm for those without"
            )
        return None
    return [tuple(case["spacing"] or given or ()) for case in data.store.cases]


def evaluate_cases(
    model: nn.Module,
    data: SliceDataset,
    *,
    spacing: Spacing | None,
    batch_size: int,
    num_workers: int,
    **how: Any,
) -> tuple[ClassCounts, CaseScores]:
    """Pooled counts and the scores of every case, the same on all processes.

    how: keyword arguments of `count_pixels`. Each process takes whole cases, and holds the
    labels of one at a time. Raises ValueError where `spacing` is superfluous.
    """
    spacings = known_spacings(data, spacing)
    shard = CaseShard([data.store.cases[number]["id"] for number, _ in data.slices])
    loader = loader_for(data, num_workers, sampler=shard, batch_size=batch_size)
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        cases = CaseCollector(data, shard.indices, spacings=spacings, run=pool.map)
        counts = count_pixels(model, loader, each=cases.add, require_finite=True, **how)
        cases.finish()
    found = json.dumps({"cases": cases.scored, "worst": cases.pictures()}, allow_nan=False)
    parts = [json.loads(text) for text in gather_texts(found)]
    scored = sorted((case for part in parts for case in part["cases"]), key=lambda case: case[0])
    worst = sorted((one for part in parts for one in part["worst"]), key=_badness)
    return counts, CaseScores(
        rows={case: rows for _, case, _, rows in scored},
        num_slices={case: number for _, case, number, _ in scored},
        in_mm=spacings is not None,
        worst=worst[:NUM_WORST],
    )


def _badness(one: Mapping[str, Any]) -> tuple[float, str]:
    return one["dice"], one["case"]


class CaseCollector:
    """Collects the slices of a case as they arrive and scores it when the next case starts.

    indices: of the samples, in the order in which they will come, those of a case together.
    spacings: by case number of the store, None for pixels. `run` maps a function over the classes.
    """

    def __init__(
        self,
        data: SliceDataset,
        indices: Sequence[int],
        *,
        spacings: Sequence[Spacing] | None,
        run: Callable = map,
    ) -> None:
        self.data, self.spacings = data, spacings
        self.scored: list[tuple[int, str, int, list[Row]]] = []  # order, case, slices, rows
        self.worst: list[Worst] = []
        self._score = partial(score_case, in_mm=spacings is not None, run=run)
        self._coming = iter(indices)
        self._case: str | None = None
        self._parts: dict[int, Part] = {}
        self._held: list[int] = []  # indices of the case's slices so far

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add the next samples: their ids in `batch`, their logits (N, C, h, w)."""
        # Channels last: a CPU then resizes and compares the classes four times as fast.
        logits = logits.float().contiguous(memory_format=torch.channels_last)
        for name, one in zip(batch["id"], logits, strict=True):
            index = next(self._coming)
            number, k = self.data.slices[index]
            case = self.data.store.cases[number]
            assert name == case["slices"][k], "slices arrive in another order than the sampler's"
            if case["id"] != self._case:
                self.finish()
                self._case = case["id"]
            if number not in self._parts:
                self._parts[number] = self._empty_part(number)
            part = self._parts[number]
            native = to_native(one[None], self.data.seen_box(index), part.truth.shape[1:])
            part.prediction[k] = native.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
            part.truth[k] = self.data.store.read(number, k)[1]
            self._held.append(index)

    def _empty_part(self, number: int) -> Part:
        shape = self.data.store.cases[number]["shape"]
        spacing = self.spacings[number] if self.spacings else (1.0, 1.0, 1.0)
        return Part(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8), spacing)

    def finish(self) -> None:
        """Score the case collected so far, if there is one."""
        if self._case is None:
            return
        rows = self._score(list(self._parts.values()), len(self.data.classes))
        self.scored.append((self._held[0], self._case, len(self._held), rows))
        dice = mean_row(rows)["dice"]
        if dice is not None:
            self.worst.append(self._worst_slice(dice))
            self.worst = sorted(self.worst, key=lambda one: one[:2])[:NUM_WORST]
        self._case, self._parts, self._held = None, {}, []

    def _worst_slice(self, dice: float) -> Worst:
        planes = [self.data.slices[index] for index in self._held]
        wrong = [
            np.count_nonzero(self._parts[number].prediction[k] != self._parts[number].truth[k])
            for number, k in planes
        ]
        number, k = planes[int(np.argmax(wrong))]
        part, case = self._parts[number], self.data.store.cases[number]
        masks = {"truth": part.truth[k].copy(), "prediction": part.prediction[k].copy()}
        image = self.data.store.read(number, k)[0]
        return Worst(dice, case["id"], case["slices"][k], np.array(image), masks)

    def pictures(self) -> list[dict[str, Any]]:
        """The worst cases as pictures of their worst slices; see `CaseScores.worst`."""
        return [
            {"case": one.case, "slice": one.slice_name, "dice": one.dice, "png": self._draw(one)}
            for one in self.worst
        ]

    def _draw(self, one: Worst) -> str:
        box = shown_box(one.masks.values())
        file = BytesIO()
        save_overlay(
            file,
            one.image[box],
            {name: mask[box] for name, mask in one.masks.items()},
            classes=self.data.classes,
            colors=class_colors(self.data.info["colors"], len(self.data.classes)),
            title=f"{one.case}, mean Dice {one.dice:.3f}: {one.slice_name}",
            transpose=self.data.info["orientation"] == "stored",
        )
        return b64encode(file.getvalue()).decode()


def shown_box(masks: Sequence[np.ndarray]) -> tuple[slice, slice]:
    """The part of a slice to draw: all labels of the masks (H, W) with a margin around them."""
    labelled = np.any([mask > 0 for mask in masks], axis=0)
    box = []
    for axis in (0, 1):
        size = labelled.shape[axis]
        found = np.flatnonzero(labelled.any(axis=1 - axis))
        low, high = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, size)
        margin = max((high - low) // 2, (MIN_SHOWN - (high - low) + 1) // 2)
        box.append(slice(max(low - margin, 0), min(high + margin, size)))
    return box[0], box[1]
