"""`--clicks challenge`: five clicks, their scores and report, as in the CVPR 2025 challenge.

Source: CVPR 2025: Foundation Models for Interactive 3D Biomedical Image Segmentation, and its
evaluation code (github.com/JunMa11/CVPR-MedSegFMCompetition). Differences: no box is given before
the clicks (not every case of the challenge has one, and its area under the curve leaves it out);
an object is scored by itself instead of with its case; depths are in mm instead of voxels; equal
ones are resolved in a fixed order instead of by chance; an answer without an error stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from dataset.files import write_json
from usam.evaluation.click_report import (
    Item,
    classes_of,
    click_names,
    draw_curves,
    failed_lines,
    mean_and_std,
    spread,
    write_scores,
)
from usam.evaluation.metrics import overlap
from usam.evaluation.surfaces import object_nsd
from usam.evaluation.tables import number, text_table

NUM_CLICKS = range(1, 6)  # an answer is scored after each
CLICKS = click_names(NUM_CLICKS)
TOLERANCE = 2.0  # mm, of the NSD
SCORES = ("dice", "nsd", "seconds")
LOW_DICE = 0.2  # up to this Dice the NSD counts as 0
SECONDS_LIMIT = 90.0  # an object
LEVELS = (0.80, 0.85, 0.90)  # of Dice, for the number of clicks needed

Answer = Callable[[tuple[int, int, int], int], np.ndarray]


def error_click(
    found: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[int, int, int] | None:
    """The voxel of the largest error that lies deepest inside it; None where nothing is wrong.

    found, truth (X, Y, Z) bool; spacing: mm along their axes. An error is a component (26
    neighbours) of all wrong voxels, missed and added ones together; the largest has the most
    voxels. Depth is the Euclidean distance to the nearest voxel outside of it; beyond the volume
    counts as outside. Of equal components and of equal depths the first in row-major order.
    """
    wrong = found != truth
    if not wrong.any():
        return None
    part = ndimage.find_objects(wrong.astype(np.uint8))[0]
    pieces, _ = ndimage.label(wrong[part], structure=np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    first = np.isin(pieces, np.flatnonzero(sizes == sizes.max())).ravel().argmax()
    largest = np.pad(pieces == pieces.ravel()[first], 1)
    depth = ndimage.distance_transform_edt(largest, sampling=spacing)[1:-1, 1:-1, 1:-1]
    # Sums of the same squares in another order differ in their last digits.
    place = np.unravel_index(depth.round(6).argmax(), depth.shape)
    return tuple(int(index) + one.start for index, one in zip(place, part, strict=True))


def score_clicks(answer: Answer, truth: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Dice, NSD and seconds (5, 3) of one object after each of five clicks.

    answer: gives the object's mask (X, Y, Z) bool after one more click, at a voxel with label 1
    in the object or 0 outside; its time alone is counted. truth (X, Y, Z) bool. Raises ValueError
    for an object without a voxel.
    """
    if not truth.any():
        raise ValueError("the object has no voxel in this volume")
    found, scores = np.zeros_like(truth), np.zeros((len(NUM_CLICKS), len(SCORES)))
    for row in scores:
        voxel = error_click(found, truth, spacing)
        if voxel is not None:
            started = time.perf_counter()
            found = answer(voxel, int(truth[voxel]))
            row[2] = time.perf_counter() - started
        sizes = [np.count_nonzero(mask) for mask in (found & truth, found, truth)]
        row[0] = overlap(*sizes)[0]
        row[1] = object_nsd(found, truth, spacing, TOLERANCE) if row[0] > LOW_DICE else 0
    return scores


# ------------------------------------------------------------------ measures


def area(values: np.ndarray) -> np.ndarray:
    """Area under the curve over the clicks, by the trapezoid: (..., 5) -> (...), at most 4."""
    return (values[..., 1:] + values[..., :-1]).sum(axis=-1) / 2


def clicks_needed(dice: np.ndarray, level: float) -> int | None:
    """The number of clicks after which Dice (5,) first is at least `level`; None if never."""
    reached = np.flatnonzero(dice >= level)
    return int(reached[0]) + 1 if len(reached) else None


def measures(scores: np.ndarray, failed: bool) -> dict[str, Any]:
    """What metrics.json says of one object, from its scores (5, 3)."""
    dice, nsd, seconds = scores.T
    return {
        "dice": dice.tolist(),
        "nsd": nsd.tolist(),
        "auc": {"dice": float(area(dice)), "nsd": float(area(nsd))},
        "final": {"dice": float(dice[-1]), "nsd": float(nsd[-1])},
        "seconds": None if failed else float(seconds.sum()),
        "over_limit": not failed and bool(seconds.sum() > SECONDS_LIMIT),
        "clicks_needed": {f"{level:.2f}": clicks_needed(dice, level) for level in LEVELS},
        "failed": failed,
    }


def summary_of(scores: np.ndarray, failed: np.ndarray) -> dict[str, Any]:
    """What metrics.json says of several objects, from scores (n, 5, 3) and failed (n,) bool."""
    dice, nsd, seconds = np.moveaxis(scores, -1, 0)
    timed = seconds[~failed].sum(axis=-1)
    needed = {}
    for level in LEVELS:
        counts = [clicks_needed(row, level) for row in dice]
        needed[f"{level:.2f}"] = {
            "mean": float(np.mean([max(NUM_CLICKS) if n is None else n for n in counts])),
            "never": counts.count(None) / len(counts),
        }
    return {
        "objects": len(scores),
        **spread(scores, NUM_CLICKS),
        "auc": {"dice": mean_and_std(area(dice)), "nsd": mean_and_std(area(nsd))},
        "final": {"dice": mean_and_std(dice[:, -1]), "nsd": mean_and_std(nsd[:, -1])},
        "seconds": {"mean": float(timed.mean()), "max": float(timed.max())} if len(timed) else None,
        "over_limit": int((timed > SECONDS_LIMIT).sum()),
        "clicks_needed": needed,
    }


# ------------------------------------------------------------------ report


def write_report(
    folder: Path,
    items: Sequence[Item],
    scores: np.ndarray,
    *,
    failed: Sequence[Item],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Save clicks.csv, metrics.json, clicks.png in `folder`; returns the content of metrics.json.

    scores (objects, 5, 3) of `score_clicks`; facts: what was evaluated and how.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_scores(folder / "clicks.csv", items, scores, NUM_CLICKS, SCORES, failed)
    bad = np.array([item in failed for item in items])
    summary = {
        **facts,
        "protocol": {
            "num_clicks": len(NUM_CLICKS),
            "box": False,
            "nsd_tolerance": TOLERANCE,
            "seconds_limit": SECONDS_LIMIT,
        },
        "objects": len(items),
        "all": summary_of(scores, bad),
        "classes": {
            name: summary_of(scores[where], bad[where]) for name, where in classes_of(items).items()
        },
        "by_object": [
            {"case": item.case_id, "class": item.name, **measures(rows, bool(is_bad))}
            for item, rows, is_bad in zip(items, scores, bad, strict=True)
        ],
        "failed": [f"{item.case_id}: {item.name}" for item in failed],
    }
    write_json(folder / "metrics.json", summary, 2, sort_keys=False)
    draw_curves(folder / "clicks.png", summary, NUM_CLICKS)
    return summary


def format_clicks(summary: Mapping[str, Any]) -> str:
    """The report as aligned lines: scores by class and click, areas, times and clicks needed."""
    curves, totals = [], []
    for name, row in [*summary["classes"].items(), ("all", summary["all"])]:
        pairs = [[row[score][clicks]["mean"] for score in ("dice", "nsd")] for clicks in CLICKS]
        pairs.append([row["auc"][score]["mean"] for score in ("dice", "nsd")])
        curves.append([name, *(f"{dice:.4f} / {nsd:.4f}" for dice, nsd in pairs)])
        seconds = row["seconds"] or {"mean": None, "max": None}
        needed = row["clicks_needed"].values()
        totals.append([
            name, number(seconds["mean"], 2), number(seconds["max"], 2), str(row["over_limit"]),
            *(f"{one['mean']:.2f} ({one['never']:.0%})" for one in needed),
        ])  # fmt: skip
    levels = [f"Dice {level:.2f}" for level in LEVELS]
    limit = f"over {SECONDS_LIMIT:g} s"
    return "\n".join([
        f"Dice / NSD at {TOLERANCE:g} mm, and the area under their curve (at most "
        f"{len(NUM_CLICKS) - 1}):",
        text_table(["class", *CLICKS, "area"], curves),
        "seconds per object (mean, max), objects over the limit, and clicks needed for a Dice "
        f"(never reached: counts as {max(NUM_CLICKS)}; share of these objects):",
        text_table(["class", "mean s", "max s", limit, *levels], totals),
        *failed_lines(summary),
    ])  # fmt: skip
