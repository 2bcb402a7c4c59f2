"""Training, validation and test cases, drawn by case and seed; one rule for slices and volumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.store.folder import SPLITS, Store

Shows = Mapping[str, Collection[int]]  # case id -> the foreground classes it shows


def held_out(
    cases: Iterable[str], fraction: float, seed: int, shows: Shows | None = None
) -> set[str]:
    """A share of the cases, the same for the same ids and seed; at least two cases remain.

    With `shows` both sides show foreground and each class, where enough cases do: a draw that lacks
    some of them is corrected by exchanging single cases, see `balanced`.
    """
    ordered = sorted(set(cases))
    number = min(round(len(ordered) * fraction), len(ordered) - 2)
    if number < 1:
        return set()
    drawn = np.random.default_rng(seed).permutation(ordered).tolist()
    return set(balanced([drawn[:number], drawn[number:]], shows)[0])


def held_out_before(cases: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The validation cases of a checkpoint that does not list them: drawn by the earlier rule."""
    total = len(set(cases))
    number = round(total * fraction)
    return set() if total < 4 or total - number < 2 else held_out(cases, fraction, seed)


def cross_validation(
    ids: Iterable[str], folds: int, seed: int, shows: Shows | None = None
) -> list[dict[str, list[str]]]:
    """[{"train": ids, "val": ids}, ...]: every case validates in exactly one fold.

    shows: see held_out. Raises ValueError for fewer than two folds or fewer cases than folds.
    """
    ordered = sorted(ids)
    if not 2 <= folds <= len(ordered):
        raise ValueError(
            f"--folds {folds}: expected 2 to {len(ordered)}, the number of training cases"
        )
    drawn = np.random.default_rng(seed).permutation(ordered).tolist()
    parts = [sorted(part) for part in balanced([drawn[k::folds] for k in range(folds)], shows)]
    return [{"train": sorted(set(ordered) - set(part)), "val": part} for part in parts]


def balanced(parts: list[list[str]], shows: Shows | None) -> list[list[str]]:
    """The parts, with cases exchanged until each has foreground and as many classes as possible.

    A class that fewer cases show than there are parts is in as many parts as possible. Parts that
    lack nothing stay as they are.
    """
    if not shows:
        return parts
    kinds = sorted({kind for found in shows.values() for kind in found})
    rows = {
        name: np.array([bool(shows[name]), *(kind in shows[name] for kind in kinds)])
        for part in parts
        for name in part
    }
    parts = [list(part) for part in parts]
    while exchange := _exchange(parts, rows):
        (p, i), (q, j) = exchange
        parts[p][i], parts[q][j] = parts[q][j], parts[p][i]
    return parts


def _exchange(
    parts: list[list[str]], rows: Mapping[str, np.ndarray]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Positions (part, index) of two cases whose exchange leaves less missing; None without one."""
    counts = np.array([np.sum([rows[name] for name in part], axis=0) for part in parts])
    possible, shown = np.minimum(len(parts), counts.sum(axis=0)), (counts > 0).sum(axis=0)
    for p, part in enumerate(parts):
        lacking = (counts[p] == 0) & (shown < possible)
        own = np.array([rows[name] for name in part], dtype=int)
        for q, other in enumerate(parts):
            elsewhere = (np.delete(counts, [p, q], axis=0) > 0).sum(axis=0)
            for j, name in enumerate(other):
                if p == q or not (rows[name] & lacking).any():
                    continue
                gained, lost = counts[p] - own + rows[name], counts[q] + own - rows[name]
                missing = (possible - elsewhere - (gained > 0) - (lost > 0)).sum(axis=1)
                if missing.min() < (possible - shown).sum():
                    return (p, int(missing.argmin())), (q, j)
    return None


def held_out_ids(
    store: Store, *, seed: int, val_fraction: float, stratified: bool = True
) -> list[str]:
    """The training cases drawn for validation, sorted; in stores of volumes their patients.

    None are drawn where the store has validation cases of its own. stratified=False draws as
    before checkpoints listed these cases.
    """
    if any(case["split"] == "val" for case in store.cases):
        return []
    shows: dict[str, set[int]] = {}
    for number, case in enumerate(store.cases):
        if case["split"] == "train" and any(case.get("listed") or [True]):
            shows.setdefault(person(case), set()).update(store.shown(number))
    if stratified:
        return sorted(held_out(shows, val_fraction, seed, shows))
    return sorted(held_out_before(shows, val_fraction, seed))


def person(case: Mapping[str, Any]) -> str:
    """The unit that a split keeps together: a volume's patient, a slice case's id."""
    return case.get("patient", case["id"])


def case_numbers(
    store: Store,
    split: str,
    *,
    val_fraction: float = 0.1,
    fold: int | None = None,
    held: Collection[str] = (),
) -> list[int]:
    """Numbers of the cases of a split; training and validation never share a case.

    With a fold, from 0, training and validation are the training cases as the store's splits.json
    divides them. Otherwise a store with validation cases of its own keeps them, val_fraction 0
    makes validation the test split, and `held` are the training cases that validate, see
    held_out_ids. Raises ValueError for another split name or fraction.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction} must be at least 0 and below 1")
    places: dict[str, list[int]] = {name: [] for name in SPLITS}
    for number, case in enumerate(store.cases):
        places[case["split"]].append(number)
    if split != "test" and fold is not None:
        ids = set(read_fold(store.folder, fold)[split])
        if missing := ids - {store.cases[number]["id"] for number in places["train"]}:
            raise ValueError(
                f"--fold {fold}: case {min(missing)} of splits.json is not among the training "
                f"cases of {store.folder}; prepare it again"
            )
        return [number for number in places["train"] if store.cases[number]["id"] in ids]
    if split == "val" and val_fraction == 0:
        return places["test"]
    if split == "test" or places["val"]:
        return places[split]
    held = set(held)
    if missing := held - {person(store.cases[number]) for number in places["train"]}:
        raise ValueError(
            f"{store.folder}: validation case {min(missing)} of the checkpoint is not among the"
            " training cases"
        )
    return [n for n in places["train"] if (person(store.cases[n]) in held) == (split == "val")]


def split_table(
    cases: Sequence[tuple[str, str]], *, folds: int | None, seed: int, shows: Shows | None = None
) -> dict[str, Any]:
    """{"train": ids, "val": ids, "test": ids, "folds": [...]} from (id, split) pairs.

    The folds divide the training cases; there are none without `folds`. shows: see held_out.
    """
    table: dict[str, Any] = {
        split: sorted({case for case, place in cases if place == split}) for split in SPLITS
    }
    table["folds"] = cross_validation(table["train"], folds, seed, shows) if folds else []
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


def fold_digest(part: Mapping[str, Sequence[str]]) -> str:
    """Hex digest of a fold's training and validation cases; --folds and --seed change it."""
    cases = [sorted(part["train"]), sorted(part["val"])]
    return hashlib.sha256(json.dumps(cases).encode()).hexdigest()
