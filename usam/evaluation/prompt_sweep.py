"""--prompt_sweep: scores of every prompt mode, with exact and with displaced prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import nn
from torch.utils.data import DataLoader

from usam.cli.choices import PROMPT_MODES
from usam.cli.values import jitter_pixels
from usam.evaluation.case_metrics import MEAN
from usam.evaluation.metrics import ClassCounts
from usam.evaluation.pixels import PROMPT_SOURCES, count_pixels
from usam.evaluation.tables import Table, number
from usam.models.prompts import jittered
from usam.runtime.loaders import Batch
from usam.runtime.progress import progress_bar

JITTERS = ("0", "2%", "5%", "10%")  # largest displacement, as a share of the image's side
TITLE = "Prompts"


class Swept(NamedTuple):
    """Pixel counts for one prompt mode and one jitter (as in --prompt_jitter)."""

    mode: int
    jitter: str
    counts: ClassCounts

    @property
    def source(self) -> str:
        """The source of the prompts in words."""
        moved = "" if self.jitter == "0" else f", off by up to {self.jitter} of the image's side"
        return PROMPT_SOURCES[self.mode] + moved


def sweep_prompts(
    model: nn.Module, loader: DataLoader, *, img_size: int, seed: int, **how: Any
) -> list[Swept]:
    """Pixel counts for each of PROMPT_MODES and JITTERS over all samples of all processes.

    how: keyword arguments of `count_pixels` but for the prompts. The displacement
    of a prompt depends on `seed`, the jitter and the slice alone.
    """
    ways = [
        (mode, jitter) for mode in PROMPT_MODES for jitter in (JITTERS if mode else JITTERS[:1])
    ]
    found = []
    for mode, jitter in progress_bar(ways, desc="prompts"):
        pixels = jitter_pixels(jitter, img_size)
        alter = partial(move_prompts, pixels=pixels, img_size=img_size, seed=seed)
        moved = {"alter_prompts": alter} if pixels else {}
        counts = count_pixels(model, loader, prompt_mode=mode, require_finite=True, **how, **moved)
        found.append(Swept(mode, jitter, counts))
    return found


def move_prompts(
    prompts: dict[str, Any], batch: Batch, *, pixels: float, img_size: int, seed: int
) -> dict[str, Any]:
    """`jittered` prompts; each sample has its own generator, seeded by `seed` and its id."""
    points, boxes = prompts["points"], prompts["boxes"]
    moved = []
    for n, name in enumerate(batch["id"]):
        own = slice(n, n + 1)
        one = {
            "points": points and tuple(part[own] for part in points),
            "boxes": None if boxes is None else boxes[own],
        }
        generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
        moved.append(jittered(one, pixels, img_size, generator))
    return {
        "points": points and tuple(torch.cat([one["points"][k] for one in moved]) for k in (0, 1)),
        "boxes": None if boxes is None else torch.cat([one["boxes"] for one in moved]),
    }


def sweep_table(found: Sequence[Swept], classes: Sequence[str]) -> Table:
    """Table header and rows: source of the prompts, Dice over all pixels by class, and means."""
    head = ["prompts", *(f"Dice, {name}" for name in classes[1:]), f"Dice, {MEAN}", f"IoU, {MEAN}"]
    rows = []
    for one in found:
        summary = one.counts.summary(classes)
        scores = [summary["dice"][name] for name in classes[1:]]
        scores += [summary["mean_dice"], summary["mean_iou"]]
        rows.append([one.source, *map(number, scores)])
    return head, rows


def sweep_facts(found: Sequence[Swept], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The same for metrics.json: mode, jitter, source and the summary of `ClassCounts` of each."""
    return [
        {"prompt_mode": one.mode, "prompt_jitter": one.jitter, "prompts": one.source}
        | one.counts.summary(classes)
        for one in found
    ]
