"""SAM-Med3D's scores: Dice and NSD after the clicks of a simulated user on held-out objects.

`evaluate` clicks in whole volumes; `click_dice` in crops, as validation does after each epoch.
"""

from __future__ import annotations

import csv
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from dataset import VolumeStore, build_volumes
from dataset.files import atomic_write, write_json
from dataset.scans.volumes import SPACING
from usam.evaluation.surfaces import surface_dice
from usam.models.prompts import largest_error_click, next_clicks
from usam.models.sam_med3d import THRESHOLD, SamMed3d
from usam.prediction.windows import EmbeddingCache, Session
from usam.runtime.figures import save_figure
from usam.runtime.loaders import Batch
from usam.runtime.precision import Precision
from usam.runtime.processes import is_main, rank, reduce_sum, world_size
from usam.runtime.progress import progress_bar

NUM_CLICKS = (1, 3, 5, 10)  # after which an answer is scored
TOLERANCE = 1.0  # mm, of the NSD
SCORES = ("dice", "nsd")
OpenCase = Callable[[int], tuple[EmbeddingCache, np.ndarray]]


Normalise = Callable[[Tensor], Tensor]


class Item(NamedTuple):
    """One object to segment: its case by number and name, its class by id and name."""

    case: int
    case_id: str
    label: int
    name: str


def evaluate(args: Namespace, precision: Precision, model: SamMed3d, store: VolumeStore) -> None:
    """Print and save what a simulated user reaches on whole test volumes, click by click."""
    data = build_volumes(
        args.dataset, "test", side=model.side, seed=args.seed, val_fraction=args.val_fraction,
        only=args.classes, store=store,
    )  # fmt: skip
    model.eval()
    items = [
        Item(number, store.cases[number]["id"], label, store.classes[label])
        for number, label in data.objects
    ]

    def open_case(number: int) -> tuple[EmbeddingCache, np.ndarray]:
        image, label = store.read(number)
        return EmbeddingCache(model, image, precision), label

    scores, failed = evaluate_objects(
        items, open_case, largest=args.clicks == "largest", spacing=SPACING, seed=args.seed
    )
    if not is_main():
        return
    facts = {
        "checkpoint": str(args.resume or args.sam_weight), "dataset": args.dataset,
        "split": "test", "cases": len(data.case_ids), "clicks": args.clicks,
    }  # fmt: skip
    folder = args.output_dir
    summary = write_report(folder, items, scores, failed=failed, facts=facts)
    print(format_clicks(summary))
    print(f"scores: {folder / 'metrics.json'}, {folder / 'clicks.csv'}\n"
          f"curves: {folder / 'clicks.png'}")  # fmt: skip


def evaluate_objects(
    items: Sequence[Item], open_case: OpenCase, *, largest: bool, spacing: float, seed: int
) -> tuple[np.ndarray, list[Item]]:
    """Scores (objects, clicks, 2) of all processes, and the objects that failed, scored 0.

    open_case: a case's number -> embeddings of its volume and its label map (X, Y, Z). Clicks are
    drawn from all errors, or set in the middle of the largest; the same for every model. The last
    axis is Dice and NSD at 1 mm; the second counts NUM_CLICKS clicks. A failure is told as it
    happens and never ends the evaluation.
    """
    scores = torch.zeros(len(items), len(NUM_CLICKS), len(SCORES), dtype=torch.float64)
    failed = torch.zeros(len(items), dtype=torch.float64)
    opened: tuple[int, tuple[EmbeddingCache, np.ndarray]] | None = None
    numbers = range(rank(), len(items), world_size())
    for number in progress_bar(numbers, desc="evaluating"):
        item = items[number]
        try:
            if opened is None or opened[0] != item.case:
                opened = item.case, open_case(item.case)
            cache, label = opened[1]
            generator = None if largest else click_generator(seed, f"{item.case_id}:{item.name}")
            scores[number] = _score_object(cache, label == item.label, generator, spacing)
        except (ValueError, OSError, RuntimeError) as error:
            scores[number], failed[number] = 0, 1
            tqdm.write(f"{item.case_id}, {item.name}: scored 0: {error}", file=sys.stderr)
    scores, failed = reduce_sum(scores).numpy(), reduce_sum(failed)
    return scores, [item for item, bad in zip(items, failed.tolist(), strict=True) if bad]


def _score_object(
    cache: EmbeddingCache, truth: np.ndarray, generator: torch.Generator | None, spacing: float
) -> Tensor:
    """Dice and NSD (clicks, 2) of one object after NUM_CLICKS clicks."""
    rows = []
    for number, logits in simulated_clicks(cache, truth, generator):
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
    cache: EmbeddingCache, truth: np.ndarray, generator: torch.Generator | None
) -> Iterator[tuple[int, Tensor]]:
    """Number of clicks so far and logits (X, Y, Z) of the whole volume, 10 times.

    truth (X, Y, Z) bool. With a generator a click is any wrong voxel, without one the middle of
    the largest error. Raises ValueError for an object without a voxel.
    """
    if not truth.any():
        raise ValueError("the object has no voxel in this volume")
    session, mask = Session(cache), torch.from_numpy(truth)[None, None]
    mask = mask.to(cache.precision.device)
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


# ------------------------------------------------------------------ crops


def crops_to_device(
    batch: Batch, normalise: Normalise, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The batch's normalised crops (N, 1, S, S, S) and masks (N, 1, S, S, S) uint8, on `device`."""
    volume = batch["image"].to(device, non_blocking=True)
    return normalise(volume), batch["mask"].to(device, non_blocking=True).unsqueeze(1)


def click_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator of the simulated user's clicks on the object called `name`.

    It depends on nothing else, so batches, processes and the order of objects change no click.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


@torch.inference_mode()
def click_dice(
    model: SamMed3d,
    loader: Iterable[Batch],
    *,
    normalise: Normalise,
    precision: Precision,
    seed: int,
) -> dict[str, Any]:
    """Dice after 1, 3, 5 and 10 clicks on held-out crops, over all processes.

    `model` is the plain module. Gives {"dice": {"1 click": mean, ...}, "mean_dice": their mean}:
    the best checkpoint is that of the highest mean over the four. Clicks are random, but the
    same in every epoch. An object whose answer is not finite counts as 0.
    """
    model.eval()
    sums = torch.zeros(len(NUM_CLICKS) + 1, dtype=torch.float64, device="cpu")
    for batch in progress_bar(loader, desc="validating"):
        volume, mask = crops_to_device(batch, normalise, precision.device)
        generators = [click_generator(seed, name) for name in batch["id"]]
        with precision.autocast():
            answers = answers_to_clicks(model, volume, mask, generators)
            scores = [
                dice(answer, mask)
                for number, answer in enumerate(answers, start=1)
                if number in NUM_CLICKS
            ]
        sums[:-1] += torch.stack(scores).double().sum(dim=1).cpu()
        sums[-1] += len(mask)
    *totals, number = reduce_sum(sums).tolist()
    means = [total / number for total in totals]
    named = zip(map(clicks_text, NUM_CLICKS), means, strict=True)
    return {"dice": dict(named), "mean_dice": sum(means) / len(means)}


def answers_to_clicks(
    model: SamMed3d, volume: Tensor, mask: Tensor, generators: list[torch.Generator]
) -> Iterator[Tensor]:
    """Logits (N, 1, S, S, S) after each of 10 simulated clicks, one generator a sample.

    As in training: clicks add up, and each round sees the logits of the one before.
    """
    embedding = model.image_encoder(volume)
    logits = embedding.new_zeros(len(volume), 1, *3 * [model.side // 4], dtype=torch.float32)
    answer, coords, labels = model.upscale(logits), [], []
    for _ in range(max(NUM_CLICKS)):
        clicks = [
            next_clicks(answer[n : n + 1], mask[n : n + 1], generator, threshold=THRESHOLD)
            for n, generator in enumerate(generators)
        ]
        coords.append(torch.cat([click[0] for click in clicks]))
        labels.append(torch.cat([click[1] for click in clicks]))
        points = torch.cat(coords, dim=1), torch.cat(labels, dim=1)
        logits = model.decode(embedding, points, logits).float()
        answer = model.upscale(logits)
        yield answer


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Dice (N,) of logits (N, 1, *S) above the threshold and mask (N, 1, *S); 0 if not finite."""
    found, truth = (logits > THRESHOLD).flatten(1), (mask > 0).flatten(1)
    both = (found & truth).sum(dim=1)
    score = 2 * both / (found.sum(dim=1) + truth.sum(dim=1)).clamp(min=1)
    return score.where(logits.flatten(1).isfinite().all(dim=1), 0)


def clicks_text(number: int) -> str:
    """A number of clicks in words, as reports name it."""
    return f"{number} click" if number == 1 else f"{number} clicks"


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
    with (
        atomic_write(folder / "clicks.csv") as scratch,
        scratch.open("w", newline="", encoding="utf-8") as file,
    ):
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
    write_json(folder / "metrics.json", summary, 2, sort_keys=False)
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
    save_figure(figure, path, dpi=120)
