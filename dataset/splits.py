"""Which case trains, validates or tests: drawn by case and seed, written as plain JSON.

`prepare` uses it; a release's own split is never changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def hold_out(ids: Sequence[str], fraction: float, seed: int) -> set[str]:
    """A share of the cases, the same for the same ids and seed; at least two stay behind."""
    ordered = sorted(ids)
    number = min(round(len(ordered) * fraction), len(ordered) - 2)
    if number < 1:
        return set()
    return set(np.random.default_rng(seed).permutation(ordered)[:number].tolist())


def cross_validation(ids: Sequence[str], folds: int, seed: int) -> list[dict[str, list[str]]]:
    """[{"train": ids, "val": ids}, ...]: every case validates in exactly one fold.

    Raises ValueError for fewer than two folds or fewer cases than folds.
    """
    ordered = sorted(ids)
    if not 2 <= folds <= len(ordered):
        raise ValueError(f"--folds {folds}: wanted 2 to the {len(ordered)} training cases at most")
    drawn = np.random.default_rng(seed).permutation(ordered).tolist()
    parts = [sorted(drawn[k::folds]) for k in range(folds)]
    return [{"train": sorted(set(ordered) - set(part)), "val": part} for part in parts]


def split_table(
    cases: Sequence[tuple[str, str]], *, folds: int | None, seed: int
) -> dict[str, Any]:
    """{"train": ids, "val": ids, "test": ids, "folds": [...]} from (id, split) pairs.

    The folds divide the training cases; there are none without `folds`.
    """
    table: dict[str, Any] = {
        split: sorted({case for case, place in cases if place == split})
        for split in ("train", "val", "test")
    }
    table["folds"] = cross_validation(table["train"], folds, seed) if folds else []
    return table


def read_fold(folder: Path, fold: int) -> dict[str, list[str]]:
    """{"train": ids, "val": ids} of a fold, from 0, of the store in `folder`.

    Raises FileNotFoundError or ValueError where its splits.json has no such fold.
    """
    path = folder / "splits.json"
    if not path.is_file():
        raise FileNotFoundError(f"--fold {fold}: no {path}; prepare the store with --folds N")
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))["folds"]
        parts = [{name: list(map(str, part[name])) for name in ("train", "val")} for part in folds]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no splits as dataset.prepare writes them ({error!r})") from None
    if fold >= len(parts):
        known = f"folds 0 to {len(parts) - 1}" if parts else "no folds; prepare it with --folds N"
        raise ValueError(f"--fold {fold}: {path} has {known}")
    return parts[fold]


def fold_digest(part: dict[str, list[str]]) -> str:
    """Hex digest of who trains and who validates in a fold: another --folds or --seed, another."""
    cases = [sorted(part["train"]), sorted(part["val"])]
    return hashlib.sha256(json.dumps(cases).encode()).hexdigest()
