"""A simulated user clicks on held-out objects in whole volumes; Dice and NSD after each click.

u-sam.py --model sam-med3d --eval calls `evaluate_objects` and `write_report`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from usam.evaluation.surfaces import surface_dice
from usam.models.prompts import largest_error_click, next_clicks
from usam.prediction.windows import Encoder, Session
from usam.runtime.processes import rank, reduce_sum, world_size
from usam.runtime.progress import progress_bar
from usam.training.clicks import NUM_CLICKS, THRESHOLD, click_generator, clicks_text

TOLERANCE = 1.0  # mm, of the NSD
SCORES = ("dice", "nsd")
OpenCase = Callable[[int], tuple[Encoder, np.ndarray]]


class Item(NamedTuple):
    """One object to segment: its case by number and name, its class by id and name."""

    case: int
    case_id: str
    label: int
    name: str


def evaluate_objects(
    items: Sequence[Item], open_case: OpenCase, *, largest: bool, spacing: float, seed: int
) -> tuple[np.ndarray, list[Item]]:
    """Scores (objects, clicks, 2) of all processes, and the objects that failed, scored 0.

    open_case: a case's number -> encoder of its volume and its label map (X, Y, Z). Clicks are
    drawn from all errors, or set in the middle of the largest; the same for every model. The last
    axis is Dice and NSD at 1 mm; the second counts NUM_CLICKS clicks. A failure is told as it
    happens and never ends the evaluation.
    """
    scores = torch.zeros(len(items), len(NUM_CLICKS), len(SCORES), dtype=torch.float64)
    failed = torch.zeros(len(items), dtype=torch.float64)
    opened: tuple[int, tuple[Encoder, np.ndarray]] | None = None
    numbers = range(rank(), len(items), world_size())
    for number in progress_bar(numbers, desc="evaluating"):
        item = items[number]
        try:
            if opened is None or opened[0] != item.case:
                opened = item.case, open_case(item.case)
            encoder, label = opened[1]
            generator = None if largest else click_generator(seed, f"{item.case_id}:{item.name}")
            scores[number] = _score_object(encoder, label == item.label, generator, spacing)
        except (ValueError, OSError, RuntimeError) as error:
            scores[number], failed[number] = 0, 1
            tqdm.write(f"{item.case_id}, {item.name}: scored 0: {error}", file=sys.stderr)
    scores, failed = reduce_sum(scores).numpy(), reduce_sum(failed)
    return scores, [item for item, bad in zip(items, failed.tolist(), strict=True) if bad]


def _score_object(
    encoder: Encoder, truth: np.ndarray, generator: torch.Generator | None, spacing: float
) -> Tensor:
    """Dice and NSD (clicks, 2) of one object after NUM_CLICKS clicks."""
    rows = []
    for number, logits in simulated_clicks(encoder, truth, generator):
        if number not in NUM_CLICKS:
            continue
        if not bool(logits.isfinite().all()):
            raise ValueError(f"logits are not finite after {clicks_text(number)}")
        found = (logits > THRESHOLD).cpu().numpy()
        both, sizes = np.count_nonzero(found & truth), np.count_nonzero(found) + truth.sum()
        nsd = surface_dice(found, truth, spacing=3 * (spacing,), tolerance=TOLERANCE)
        rows.append([2 * both / sizes, nsd])
    return torch.tensor(rows, dtype=torch.float64)


def simulated_clicks(
    encoder: Encoder, truth: np.ndarray, generator: torch.Generator | None
) -> Iterator[tuple[int, Tensor]]:
    """Number of clicks so far and logits (X, Y, Z) of the whole volume, 10 times.

    truth (X, Y, Z) bool. With a generator a click is any wrong voxel, without one the middle of
    the largest error. Raises ValueError for an object without a voxel.
    """
    if not truth.any():
        raise ValueError("the object has no voxel in this volume")
    session, mask = Session(encoder), torch.from_numpy(truth)[None, None]
    mask = mask.to(encoder.precision.device)
    logits = torch.zeros(mask.shape, device=mask.device)
    for number in range(1, max(NUM_CLICKS) + 1):
        if generator is not None:
            coords, labels = next_clicks(logits, mask, generator, threshold=THRESHOLD)
        else:
            coords, labels = _largest_error(logits, mask)
        session.click(tuple(coords[0, 0].long().tolist()), int(labels[0, 0]))
        logits = session.logits[None, None]
        yield number, logits[0, 0]


def _largest_error(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`largest_error_click` computed on the box of all errors only, for volumes of any size."""
    wrong = (logits > THRESHOLD) != mask
    where = (wrong if wrong.any() else mask)[0, 0].nonzero()
    low, high = where.amin(dim=0), where.amax(dim=0) + 1
    part = (..., *(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)))
    coords, labels = largest_error_click(logits[part], mask[part], threshold=THRESHOLD)
    return coords + low, labels


# ------------------------------------------------------------------ report


def write_report(
    folder: Path,
    items: Sequence[Item],
    scores: np.ndarray,
    *,
    failed: Sequence[Item],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Save clicks.csv, metrics.json and clicks.png into `folder`; what metrics.json holds.

    scores (objects, clicks, 2) of `evaluate_objects`; facts: what was evaluated, and how.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "clicks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "class", "clicks", *SCORES, "failed"])
        for item, rows in zip(items, scores, strict=True):
            for number, values in zip(NUM_CLICKS, rows, strict=True):
                shown = [f"{value:.6f}" for value in values]
                writer.writerow([item.case_id, item.name, number, *shown, int(item in failed)])
    names = [item.name for item in items]
    classes = {
        name: spread(scores[[other == name for other in names]]) for name in dict.fromkeys(names)
    }
    summary = {
        **facts,
        "objects": len(items),
        "all": spread(scores),
        "classes": classes,
        "failed": [f"{item.case_id}: {item.name}" for item in failed],
    }
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    draw_curves(folder / "clicks.png", summary)
    return summary


def spread(scores: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over objects (n, clicks, 2), by score and number of clicks."""
    return {
        score: {
            clicks_text(number): {
                "mean": float(scores[:, k, s].mean()),
                "std": float(scores[:, k, s].std()),
            }
            for k, number in enumerate(NUM_CLICKS)
        }
        for s, score in enumerate(SCORES)
    }


def format_clicks(summary: Mapping[str, Any]) -> str:
    """The report as aligned lines: Dice and NSD of each class after each number of clicks."""
    rows = {**summary["classes"], "all": summary["all"]}
    width = max(len(name) for name in [*rows, "class"])
    head = "  ".join(f"{clicks_text(number):>15}" for number in NUM_CLICKS)
    lines = [f"{'class':<{width}}  {head}   (Dice / NSD at 1 mm)"]
    for name, row in rows.items():
        cells = [
            f"{row['dice'][key]['mean']:.4f} / {row['nsd'][key]['mean']:.4f}"
            for key in map(clicks_text, NUM_CLICKS)
        ]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>15}" for cell in cells))
    if summary["failed"]:
        lines.append(f"failed, counted as 0: {', '.join(summary['failed'])}")
    return "\n".join(lines)


def draw_curves(path: Path, summary: Mapping[str, Any]) -> None:
    """Dice over the number of clicks as PNG: each class, and all with their spread."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axis = figure.subplots()
    keys = [clicks_text(number) for number in NUM_CLICKS]
    for name, row in summary["classes"].items():
        axis.plot(
            NUM_CLICKS, [row["dice"][key]["mean"] for key in keys], marker="o", ms=3, label=name
        )
    mean = np.array([summary["all"]["dice"][key]["mean"] for key in keys])
    std = np.array([summary["all"]["dice"][key]["std"] for key in keys])
    axis.fill_between(NUM_CLICKS, mean - std, (mean + std).clip(max=1), color="black", alpha=0.08)
    axis.plot(NUM_CLICKS, mean, color="black", lw=2, marker="o", ms=4, label="all (band: 1 SD)")
    axis.set(xlabel="clicks", ylabel="Dice", ylim=(0, 1), xticks=NUM_CLICKS)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=120)
