"""Data for training and evaluation: opens a data set by name and folder as a Dataset.

`u-sam.py` calls `build_dataset`; a new source of data becomes one more line of DATASETS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from dataset import care as rectum
from dataset import word
from dataset.phantom import pelvis as phantom
from dataset.slices import SliceDataset, thin_out_empty
from dataset.splits import case_numbers, fold_digest, held_out_ids, read_fold
from dataset.store.slices import SliceStore
from dataset.store.volumes import VolumeStore
from dataset.volumes import VOLUMES, VolumeDataset, build_volumes, open_volumes

__all__ = [
    "DATASETS",
    "VOLUMES",
    "SliceDataset",
    "SliceStore",
    "VolumeDataset",
    "VolumeStore",
    "build_dataset",
    "build_volumes",
    "open_store",
    "open_volumes",
]


SPLIT_HINT = {
    "train": "it has no training cases, or --empty leaves out all their slices",
    "test": "stores prepared with --test_fraction 0.2 have some; with --folds, use --fold 0",
}


class Source(NamedTuple):
    """A source of slices: how its store is opened (and made), and how training uses it."""

    open: Callable[..., SliceStore]
    root: str | None = None  # where its data lies unless --data_root says otherwise
    crop: float = 0.0  # share of the side cut off at each edge
    foreground_only: bool = False  # in training
    layout: str | None = None  # its name in dataset.prepare, where only a store of that has folds


DATASETS = {
    "rectum": Source(rectum.open_store, "data/CARE", layout="care"),
    "word": Source(word.open_store, "data/WORD", crop=word.CROP, foreground_only=True),
    "phantom": Source(phantom.open_store, "data/phantom"),
    "store": Source(SliceStore),
}


def open_store(name: str, data_root: Path | str | None = None, **extra: Any) -> SliceStore:
    """The slice store of a data set, made on first use where its source needs that.

    Of several processes, one should call this before the others do. `extra` goes to the source.
    Raises ValueError for an unknown name, FileNotFoundError where there is no data.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not one of {', '.join(DATASETS)}")
    root = data_root if data_root is not None else DATASETS[name].root
    if root is None:
        raise ValueError(f"dataset {name}: --data_root must name the folder of a prepared store")
    return DATASETS[name].open(root, **extra)


def build_dataset(
    name: str,
    split: str,
    *,
    data_root: Path | str | None = None,
    img_size: int = 224,
    seed: int = 202307,
    val_fraction: float = 0.1,
    empty: float | None = None,
    store: SliceStore | None = None,
    input_mode: str = "2d",
    fold: int | None = None,
    held_out: Collection[str] | None = None,
    stratified: bool = True,
    random_contrast: bool = True,
    **extra: Any,
) -> SliceDataset:
    """The slices of a split ("train", "val", "test") as a Dataset; see SliceDataset for items.

    empty: share of the training slices that may be without foreground, from 0 (none) to 1 (all);
    None leaves it to the data set. `store` spares opening it again. input_mode: "2d" or "2.5d".
    random_contrast: see SliceDataset.
    fold: see splits.case_numbers. held_out: ids of the training cases that validate, as a
    checkpoint lists them; None draws them by seed, by the rule of earlier checkpoints if not
    `stratified`. Validation may be empty (too few cases); training and test may not:
    FileNotFoundError. ValueError where the source has no folds. Errors of open_store and
    case_numbers pass through.
    """
    layout = DATASETS[name].layout if name in DATASETS else None
    if fold is not None and layout:
        root = data_root if data_root is not None else DATASETS[name].root
        raise ValueError(
            f"--fold {fold}: --dataset {name} has no folds; python -m dataset.prepare {layout} "
            f"--input {root} --output X --folds 5, then --dataset store --data_root X --fold {fold}"
        )
    store = store or open_store(name, data_root, **extra)
    if held_out is None:
        how = {"seed": seed, "val_fraction": val_fraction, "stratified": stratified}
        held_out = held_out_ids(store, **how)
    numbers = case_numbers(store, split, val_fraction=val_fraction, fold=fold, held=held_out)
    chosen = [place for number in numbers for place in store.listed(number)]
    if split == "train":
        share = empty if empty is not None else float(not DATASETS[name].foreground_only)
        chosen = thin_out_empty(store, chosen, share, seed)
    if not chosen and (split != "val" or val_fraction == 0):
        wanted = "test" if split == "val" else split
        raise FileNotFoundError(
            f"dataset {name}: no {wanted} slices in {store.folder}; {SPLIT_HINT[wanted]}"
        )
    return SliceDataset(
        store, chosen, img_size=img_size, seed=seed, crop=DATASETS[name].crop,
        input_mode=input_mode, random_contrast=random_contrast,
        fold_digest=None if fold is None else fold_digest(read_fold(store.folder, fold)),
        held_out=None if fold is not None else sorted(held_out),
    )  # fmt: skip
