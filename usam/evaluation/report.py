"""What a run tells: a line an epoch, the table of an evaluation, metrics.json and overlays.

u-sam.py calls it with the test data after counting; nothing here decides how a model is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.files import write_json
from usam.evaluation.metrics import ClassCounts, format_table
from usam.runtime.figures import save_overlay

PROMPT_SOURCES = (
    "none",
    "boxes around the true masks",
    "3 points a class in the true masks",
    "3 points a class in the true masks and boxes around them",
)


def one_line(
    line: Mapping[str, Any], figures: Mapping[str, float | None], seconds: float, *, is_best: bool
) -> str:
    """An epoch's figures for the terminal; `line` as in log.jsonl, `figures` its scores by name."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    text = f"epoch {line['epoch']}: loss {loss}"
    if figures:
        shown = [f"{name} {value:.3f}" for name, value in figures.items() if value is not None]
        source = f" (prompts: {line['val']['prompts']})" if "prompts" in line["val"] else ""
        text += f", validation Dice{source} " + ", ".join(shown)
        text += " (best)" if is_best else ""
    if line["skipped_steps"]:
        text += f", {line['skipped_steps']} steps left out (gradients not finite)"
    if line["quarantined"]:
        text += f", {line['quarantined']} samples unreadable"
    return text + f", {seconds:.0f} s"


def write_scores(
    folder: Path,
    counts: ClassCounts,
    classes: list[str],
    facts: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Print the scores of `counts` and save them with `facts` as metrics.json; the file's path.

    facts: what was evaluated, on what and with which prompts. The published protocol, which
    leaves out slices without any true foreground, stands beside the scores of all slices. more:
    what else metrics.json is to hold.
    """
    summary = counts.summary(classes)
    published = counts.summary(classes, foreground_only=True)
    print(
        f"{facts['checkpoint']} on {facts['slices']} {facts['split']} slices of {facts['cases']} "
        f"cases of {facts['dataset']}; prompts: {facts['prompts']}; Dice and IoU of all pixels"
    )
    print(format_table(summary))
    if published["mean_dice"] is not None:
        print(
            f"slices with foreground only (the published protocol): mean Dice "
            f"{published['mean_dice']:.4f}, IoU {published['mean_iou']:.4f}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    scores = {**facts, **summary, "foreground_slices_only": published, **(more or {})}
    write_json(path, scores, 2, sort_keys=False)
    return path


def draw_overlays(
    folder: Path,
    shown: Iterable[tuple[dict[str, Any], Tensor, dict[str, Any], Tensor]],
    *,
    classes: list[str],
    colors: list[str],
    transpose: bool,
) -> list[Path]:
    """One picture a slice: image with its prompts, truth, prediction; the files' paths.

    shown: batches of one slice from `predictions`. `transpose` turns data upright
    that is stored on its side. Pictures of an earlier evaluation in `folder` are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for picture in folder.glob("*.png"):
        picture.unlink()
    paths = []
    for batch, mask, prompts, logits in shown:
        name = batch["id"][0]
        points, boxes = prompts.get("points"), prompts.get("boxes")
        masks = {
            "truth": mask[0].cpu().numpy(),
            "prediction": logits[0].argmax(dim=0).cpu().numpy(),
        }
        file = re.sub(r"[^\w.-]", "_", name)  # an index may name its slices anything
        paths.append(folder / f"{file}.png")
        save_overlay(
            paths[-1],
            batch["image"][0, batch["image"].shape[1] // 2].numpy(),  # in 2.5D its neighbours, too
            masks,
            classes=classes,
            colors=colors,
            title=name,
            points=points and tuple(value[0].cpu().numpy() for value in points),
            box=None if boxes is None else boxes[0].cpu().numpy(),
            transpose=transpose,
        )
    return paths
