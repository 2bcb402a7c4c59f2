"""SAM-Med3D's scores: Dice and NSD after the clicks of a simulated user on held-out objects.

`evaluate` clicks in whole volumes; `click_dice` in crops, as validation does after each epoch.
"""

from __future__ import annotations

import sys
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import VolumeStore, build_volumes, open_volumes
from dataset.scans.volumes import SPACING
from dataset.text import counted, printable
from usam.evaluation import challenge, click_report
from usam.evaluation.checks import any_record, check_held_out, small_tolerances
from usam.evaluation.click_report import NUM_CLICKS, SCORES, TOLERANCE, Item
from usam.evaluation.metrics import overlap
from usam.evaluation.surfaces import object_nsd
from usam.models.prompts import largest_error_click, next_clicks
from usam.models.sam_med3d import THRESHOLD, SamMed3d
from usam.prediction.windows import EmbeddingCache, Session
from usam.runtime.loaders import Batch
from usam.runtime.precision import Precision
from usam.runtime.processes import is_main, main_process_first, rank, reduce_sum, say, world_size
from usam.runtime.progress import progress_bar
from usam.weights.sam_med3d import load_or_initialize

OpenCase = Callable[[int], tuple[EmbeddingCache, np.ndarray]]
Score = Callable[[EmbeddingCache, np.ndarray, Item], Tensor]
Normalise = Callable[[Tensor], Tensor]


def evaluate(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> None:
    """Print and save the scores after the clicks of a simulated user in whole test volumes."""
    model = load_or_initialize(args, saved).to(precision.device).eval()
    with main_process_first():
        store = open_volumes(args.dataset, args.data_root)
    for line in store.dropped:
        say(f"left out: {line}")
    data = build_volumes(
        args.dataset, "test", side=model.side, seed=args.seed, val_fraction=args.val_fraction,
        only=args.classes, store=store,
    )  # fmt: skip
    items = [
        Item(number, store.cases[number]["id"], label, store.classes[label])
        for number, label in data.objects
    ]
    report = challenge if args.clicks == "challenge" else click_report
    used, notes = check_fit(args, saved, items, store, report.TOLERANCE)

    def open_case(number: int) -> tuple[EmbeddingCache, np.ndarray]:
        image, label = store.read(number)
        return EmbeddingCache(model, image, precision), label

    if report is challenge:
        shape = len(challenge.NUM_CLICKS), len(challenge.SCORES)
        scores, failed = score_objects(items, open_case, score_in_challenge, shape)
    else:
        scores, failed = evaluate_objects(
            items, open_case, largest=args.clicks == "largest", spacing=SPACING, seed=args.seed
        )
    if not is_main():
        return
    facts = {
        "checkpoint": str(args.resume or args.sam_weight), "dataset": args.dataset,
        "split": "test", "cases": len(data.case_ids), "clicks": args.clicks,
        "notes": notes, "held_out": used,
    }  # fmt: skip
    folder = args.output_dir
    summary = report.write_report(folder, items, scores, failed=failed, facts=facts)
    print(report.format_clicks(summary))
    print(f"scores: {folder / 'metrics.json'}, {folder / 'clicks.csv'}\n"
          f"curves: {folder / 'clicks.png'}")  # fmt: skip


def check_fit(
    args: Namespace,
    saved: dict[str, Any] | None,
    items: Sequence[Item],
    store: VolumeStore,
    tolerance: float,
) -> tuple[dict[str, Any], list[str]]:
    """How the cases were used in training, and notes; both go into metrics.json.

    tolerance: mm, of the NSD.
    """
    checkpoints = [(args.resume or args.sam_weight, saved or {"data": {}})]
    digests = store.case_digests(item.case for item in items) if any_record(checkpoints) else {}
    used, notes = check_held_out(checkpoints, digests, override=args.override)
    notes += small_tolerances([(SPACING,)], [tolerance])
    for line in notes:
        say(line)
    return used, notes


def evaluate_objects(
    items: Sequence[Item], open_case: OpenCase, *, largest: bool, spacing: float, seed: int
) -> tuple[np.ndarray, list[Item]]:
    """Scores (objects, clicks, 2) of all processes, and the objects that failed, scored 0.

    Clicks are drawn from all errors, or set in the middle of the largest; the same for every
    model. The last axis is Dice and NSD at 1 mm; the second counts NUM_CLICKS clicks.
    """

    def score(cache: EmbeddingCache, truth: np.ndarray, item: Item) -> Tensor:
        generator = None if largest else click_generator(seed, f"{item.case_id}:{item.name}")
        return _score_object(cache, truth, generator, spacing)

    return score_objects(items, open_case, score, (len(NUM_CLICKS), len(SCORES)))


def score_objects(
    items: Sequence[Item], open_case: OpenCase, score: Score, shape: tuple[int, ...]
) -> tuple[np.ndarray, list[Item]]:
    """Scores (objects, *shape) of all processes, and the objects that failed, scored 0.

    open_case: a case's number -> embeddings of its volume and its label map (X, Y, Z). score: the
    scores (*shape) of one object. A failure is printed and does not end the evaluation.
    """
    scores = torch.zeros(len(items), *shape, dtype=torch.float64)
    failed = torch.zeros(len(items), dtype=torch.float64)
    opened: tuple[int, tuple[EmbeddingCache, np.ndarray]] | None = None
    numbers = range(rank(), len(items), world_size())
    for number in progress_bar(numbers, desc="evaluating"):
        item = items[number]
        try:
            if opened is None or opened[0] != item.case:
                opened = item.case, open_case(item.case)
            cache, label = opened[1]
            scores[number] = score(cache, label == item.label, item)
        except (ValueError, OSError, RuntimeError) as error:
            scores[number], failed[number] = 0, 1
            name = printable(f"{item.case_id}, {item.name}")
            tqdm.write(f"{name}: scored 0: {error}", file=sys.stderr)
    scores, failed = reduce_sum(scores).numpy(), reduce_sum(failed)
    return scores, [item for item, bad in zip(items, failed.tolist(), strict=True) if bad]


def score_in_challenge(cache: EmbeddingCache, truth: np.ndarray, item: Item) -> Tensor:
    """Dice, NSD and seconds (5, 3) of one object after each of the challenge's five clicks."""
    session = Session(cache)

    def answer(voxel: tuple[int, int, int], label: int) -> np.ndarray:
        session.click(voxel, label)
        return (session.logits > THRESHOLD).cpu().numpy()

    return torch.from_numpy(challenge.score_clicks(answer, truth, 3 * (SPACING,)))


def _score_object(
    cache: EmbeddingCache, truth: np.ndarray, generator: torch.Generator | None, spacing: float
) -> Tensor:
    """Dice and NSD (clicks, 2) of one object after NUM_CLICKS clicks."""
    rows = []
    for number, logits in simulated_clicks(cache, truth, generator):
        if number not in NUM_CLICKS:
            continue
        if not bool(logits.isfinite().all()):
            raise ValueError(f"logits are not finite after {counted(number, 'click')}")
        found = (logits > THRESHOLD).cpu().numpy()
        sizes = [np.count_nonzero(mask) for mask in (found & truth, found, truth)]
        rows.append([overlap(*sizes)[0], object_nsd(found, truth, 3 * (spacing,), TOLERANCE)])
    return torch.tensor(rows, dtype=torch.float64)


def simulated_clicks(
    cache: EmbeddingCache, truth: np.ndarray, generator: torch.Generator | None
) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of clicks and the logits (X, Y, Z) of the whole volume, 10 times.

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

    Clicks do not depend on batches, processes or the order of objects.
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
    names = [counted(number, "click") for number in NUM_CLICKS]
    return {"dice": dict(zip(names, means, strict=True)), "mean_dice": sum(means) / len(means)}


def answers_to_clicks(
    model: SamMed3d, volume: Tensor, mask: Tensor, generators: list[torch.Generator]
) -> Iterator[Tensor]:
    """Logits (N, 1, S, S, S) after each of 10 simulated clicks, one generator per sample.

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
    score, _ = overlap(*(voxels.sum(dim=1) for voxels in (found & truth, found, truth)))
    return score.where(logits.flatten(1).isfinite().all(dim=1), 0)
