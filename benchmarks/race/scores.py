"""One scorer for all rows: label maps of the stored size against the store's own labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset import SliceDataset
from dataset.store.slices import SliceStore
from usam.evaluation.case_metrics import Part, score_case
from usam.evaluation.metrics import overlap
from usam.evaluation.pixels import predictions
from usam.prediction.slices import to_native
from usam.runtime.loaders import evaluation_loader
from usam.runtime.precision import Precision

Labels = dict[str, np.ndarray]  # case -> (S, H, W) uint8
PIXELS = (1.0, 1.0, 1.0)  # the spacing: distances are in voxels, whatever the scan says
RESAMPLES = 10_000


def predict_labels(model: nn.Module, data: SliceDataset, precision: Precision) -> Labels:
    """What a model answers without prompts, at the stored size."""
    found = {
        data.store.cases[number]["id"]: np.zeros(data.store.cases[number]["shape"], np.uint8)
        for number in data.case_numbers
    }
    places = iter(enumerate(data.slices))
    loader = evaluation_loader(data, num_workers=0, batch_size=16)
    for _, _, _, logits in predictions(model, loader, prompt_mode=0, precision=precision):
        for one in logits.float():
            index, (number, k) = next(places)
            labels = found[data.store.cases[number]["id"]]
            native = to_native(one[None], data.seen_box(index), labels.shape[1:])
            labels[k] = native.argmax(dim=1)[0].to(torch.uint8).numpy()
    return found


def score(store: SliceStore, predicted: Labels, split: str) -> dict[str, dict[str, Any]]:
    """By patient, lists with a value a foreground class: dice and hd95 (None: class absent).

    counts: [in both, predicted, true] voxels. Raises ValueError for patients without an answer or
    an answer of another size.
    """
    patients = {}
    for number, case in enumerate(store.cases):
        if case["split"] != split:
            continue
        truth = np.array(store.arrays(number)[1])
        answer = predicted.get(case["id"])
        if answer is None or answer.shape != truth.shape:
            found = "none" if answer is None else answer.shape
            raise ValueError(f"case {case['id']}: wanted labels {truth.shape}, found {found}")
        rows = score_case([Part(answer, truth, PIXELS)], len(store.classes), in_mm=False)
        patients[case["id"]] = {
            "dice": [row["dice"] for row in rows],
            "hd95": [row["hd95"] for row in rows],
            "counts": [
                [int(np.count_nonzero(mask)) for mask in (a & t, a, t)]
                for a, t in ((answer == c, truth == c) for c in range(1, len(store.classes)))
            ],
        }
    return patients


def pooled_dice(patients: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    """Dice of each class over the voxels of all patients; None for a class that is nowhere."""
    sums = np.sum([patient["counts"] for patient in patients.values()], axis=0).tolist()
    return [overlap(*counts)[0] if any(counts) else None for counts in sums]


def mean_known(values: Sequence[float | None]) -> float:
    """The mean of the values that are not None; nan without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def by_patient(runs: Sequence[Mapping[str, Any]], metric: str = "dice") -> dict[str, float]:
    """Each patient's mean over classes, then over the runs (seeds)."""
    names = runs[0]["patients"]
    return {
        name: mean_known([mean_known(run["patients"][name][metric]) for run in runs])
        for name in names
    }


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval over patients (Efron 1979)."""
    known = np.asarray(values, float)
    drawn = np.random.default_rng(seed).integers(len(known), size=(RESAMPLES, len(known)))
    low, high = np.quantile(known[drawn].mean(axis=1), [0.025, 0.975])
    return float(known.mean()), float(low), float(high)


def paired_interval(
    ours: Mapping[str, float], theirs: Mapping[str, float]
) -> tuple[float, float, float]:
    """`interval` of the differences (ours less theirs) of the same patients.

    Raises ValueError unless both have the same patients.
    """
    if ours.keys() != theirs.keys():
        raise ValueError("a paired interval needs the same patients on both sides")
    return interval([ours[name] - theirs[name] for name in ours])
