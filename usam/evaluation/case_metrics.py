"""The scores of one case, class by class, and their mean, spread and intervals over many cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from usam.evaluation.metrics import overlap
from usam.evaluation.surfaces import hausdorff95, surface_dice, surface_distances

TOLERANCES = (1.0, 2.0)  # of the NSD, in the unit of distances
RESAMPLES = 10_000  # of the bootstrap
TOUCHING = np.ones((3, 3, 3))  # voxels that share a face, an edge or a corner are connected
MEAN = "mean without background"  # the row of a case's mean over its classes

Row = dict[str, Any]


class Metric(NamedTuple):
    """How a score is displayed: name, kind of unit (see `title_of`) or None, decimals."""

    title: str
    unit: str | None = None
    decimals: int = 4


METRICS = {
    "dice": Metric("Dice"),
    "iou": Metric("IoU"),
    "hd95": Metric("HD95", "distance", 2),
    "nsd_1": Metric("NSD at 1"),
    "nsd_2": Metric("NSD at 2"),
    "volume_difference": Metric("volume difference", "volume", 2),
    "volume_difference_percent": Metric("volume difference", "percent", 1),
    "detection_rate": Metric("lesion detection rate"),
}


class Part(NamedTuple):
    """The slices of a case that share a size: predicted and true labels, and their voxels.

    prediction, truth (S, H, W) uint8; spacing (z, y, x) in mm, or 1, 1, 1 for pixels.
    """

    prediction: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, float, float]


def score_case(
    parts: Sequence[Part], num_classes: int, *, in_mm: bool, run: Callable = map
) -> list[Row]:
    """The scores of a case, one row per foreground class in order of label.

    A case is one volume, or several where its slices differ in size: voxels, surfaces and
    lesions of all count together. `run` maps a function over the labels, in threads if need be.
    Without mm (`in_mm`) distances are in pixels, volumes in voxels. Rules: see `score_class`.
    """
    boxes = [_boxes(part, num_classes) for part in parts]
    flat = all(len(part.truth) == 1 for part in parts)

    def score(label: int) -> Row:
        masks = [
            (part.prediction[box[label]] == label, part.truth[box[label]] == label, part.spacing)
            for part, box in zip(parts, boxes, strict=True)
            if box[label] is not None
        ]
        diagonal = max(
            float(np.linalg.norm((np.array(part.truth.shape) - 1) * part.spacing)) for part in parts
        )
        return score_class(masks, diagonal=diagonal, in_mm=in_mm, flat=flat)

    return list(run(score, range(1, num_classes)))


def _boxes(part: Part, num_classes: int) -> list[tuple[slice, ...] | None]:
    """The bounding box of each label's voxels, predicted or true; None if it has none."""
    found = [ndimage.find_objects(labels, num_classes - 1) for labels in part[:2]]
    boxes: list[tuple[slice, ...] | None] = [None]
    for both in zip(*found, strict=True):
        axes = zip(*(box for box in both if box is not None), strict=True)
        joined = tuple(
            slice(min(one.start for one in axis), max(one.stop for one in axis)) for axis in axes
        )
        boxes.append(joined or None)
    return boxes


def score_class(
    masks: Sequence[tuple[np.ndarray, np.ndarray, Sequence[float]]],
    *,
    diagonal: float,
    in_mm: bool = True,
    flat: bool = False,
) -> Row:
    """The scores of one class in one case: METRICS, None where undefined, volumes and lesions.

    masks: (prediction, truth, spacing) of each volume, bool (S, H, W); flat: each is a case's only
    slice, and surfaces are its contours. A class that is

    - neither true nor predicted has no scores ("absent"),
    - true but not predicted ("missed") or predicted but not true ("false alarm") has Dice, IoU and
      NSD 0 and for HD95 the longest distance in the case, `diagonal`, which also limits it.

    A lesion is a connected piece of the truth (26 neighbours); it is detected if a voxel of it is
    predicted. The rate is None without lesions. A false lesion is a connected piece of the
    prediction that touches no truth. Volume differences are predicted less true: in ml (or voxels)
    and in per cent of the true volume, None where that is 0.
    """
    sizes, (predicted_volume, true_volume), lesions = _counted(masks, in_mm)
    shared, predicted, true = sizes
    row: Row = dict.fromkeys(METRICS)
    row |= {"empty": "", "true_volume": true_volume, "predicted_volume": predicted_volume}
    row |= dict(zip(("lesions", "lesions_found", "false_lesions"), lesions, strict=True))
    if not predicted and not true:
        return row | {"empty": "absent"}
    if not predicted or not true:
        row["empty"] = "missed" if true else "false alarm"
        row |= dict.fromkeys(("dice", "iou", "nsd_1", "nsd_2"), 0.0) | {"hd95": diagonal}
    else:
        surfaces = surface_distances(masks, flat=flat)
        row["dice"], row["iou"] = overlap(shared, predicted, true)
        row["nsd_1"], row["nsd_2"] = (surface_dice(surfaces, mm) for mm in TOLERANCES)
        row["hd95"] = min(hausdorff95(surfaces), diagonal)
    row["volume_difference"] = predicted_volume - true_volume
    if true:
        row["volume_difference_percent"] = 100 * row["volume_difference"] / true_volume
        row["detection_rate"] = row["lesions_found"] / row["lesions"]
    return row


def _counted(
    masks: Sequence[tuple[np.ndarray, np.ndarray, Sequence[float]]], in_mm: bool
) -> tuple[list[int], list[float], list[int]]:
    """Voxels (both, predicted, true), volumes (predicted, true) and lesions (see `_lesions`)."""
    sizes, volumes, lesions = np.zeros(3, int), np.zeros(2), np.zeros(3, int)
    for prediction, truth, spacing in masks:
        both = prediction & truth
        counts = np.array([np.count_nonzero(mask) for mask in (both, prediction, truth)])
        sizes += counts
        volumes += counts[1:] * (np.prod(spacing) / 1000 if in_mm else 1)
        lesions += _lesions(prediction, truth, both)
    return sizes.tolist(), volumes.tolist(), lesions.tolist()


def _lesions(prediction: np.ndarray, truth: np.ndarray, both: np.ndarray) -> tuple[int, int, int]:
    """Numbers of lesions in the truth, of those with a predicted voxel, and of false ones."""
    pieces, number = ndimage.label(truth, TOUCHING)
    wrong, predicted = ndimage.label(prediction, TOUCHING)
    return number, len(np.unique(pieces[both])), predicted - len(np.unique(wrong[both]))


# ---------------------------------------------------------------- many cases


def summarize(
    cases: Mapping[str, Sequence[Row]], classes: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Statistics over the cases by class and metric; see `describe`.

    cases: by case, its rows in order of label; classes: names by label, background first. With
    several foreground classes a last entry, MEAN, describes each case's mean over the classes
    that have the score. "lesions" sums up lesions, those found and false ones over the cases.
    """
    by_class = {
        name: [rows[label] for rows in cases.values()] for label, name in enumerate(classes[1:])
    }
    if len(by_class) > 1:
        by_class[MEAN] = [mean_row(rows) for rows in cases.values()]
    summary = {}
    for name, rows in by_class.items():
        summary[name] = {
            metric: describe([row[metric] for row in rows if row[metric] is not None], seed)
            for metric in METRICS
        }
        summary[name]["lesions"] = {
            key: sum(row[key] for row in rows)
            for key in ("lesions", "lesions_found", "false_lesions")
        }
    return summary


def mean_row(rows: Sequence[Row]) -> Row:
    """A case's means over the classes that have the score, and the sums of its lesions."""
    means: Row = {}
    for metric in METRICS:
        known = [row[metric] for row in rows if row[metric] is not None]
        means[metric] = sum(known) / len(known) if known else None
    for key in ("lesions", "lesions_found", "false_lesions"):
        means[key] = sum(row[key] for row in rows)
    return means


def describe(values: Iterable[float], seed: int) -> dict[str, float | int | None]:
    """Number, mean, standard deviation (of the sample), median and 95 % interval of the mean.

    "low" and "high" hold 95 % of the means of RESAMPLES sets of cases drawn with replacement,
    each as large as the set itself (percentile bootstrap, Efron 1979), the same for the same
    `seed`. Statistics that need more values are None.
    """
    known = np.array(list(values), float)
    found: dict[str, float | int | None] = {"n": len(known)}
    found |= dict.fromkeys(("mean", "std", "median", "low", "high"))
    if len(known):
        found |= {"mean": float(known.mean()), "median": float(np.median(known))}
    if len(known) > 1:
        drawn = np.random.default_rng(seed).integers(len(known), size=(RESAMPLES, len(known)))
        low, high = np.quantile(known[drawn].mean(axis=1), [0.025, 0.975])
        found |= {"std": float(known.std(ddof=1)), "low": float(low), "high": float(high)}
    return found
