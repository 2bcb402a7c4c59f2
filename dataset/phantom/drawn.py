"""Stores of drawn cases: reused if they match what is asked for, else drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from dataset.store.slices import SliceStore
from dataset.store.volumes import VolumeStore

Store = TypeVar("Store", SliceStore, VolumeStore)


def open_drawn(
    name: str,
    folder: Path,
    kind: type[Store],
    build: Callable[..., Path],
    *,
    version: int,
    recipe: Mapping[str, int],
) -> Store:
    """The drawn data set `name` in a folder, drawn there first where missing or out of date.

    recipe: keyword arguments of `build`. A data set drawn by this version with the values named in
    recipe is used as it is. Raises ValueError where the folder holds something else.
    """
    recipe = dict(recipe)
    if (folder / "index.json").is_file():
        store = kind(folder)
        found = store.index.get("recipe")
        if store.index.get("dataset") != name or not isinstance(found, dict):
            raise ValueError(f"{name}: {folder} holds another data set; pass another --data_root")
        if all(found.get(key) == value for key, value in {"version": version, **recipe}.items()):
            return store
        recipe = {key: found[key] for key in found if key != "version"} | recipe
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{name}: {folder} holds other files; pass an empty or new --data_root")
    return kind(build(folder, **recipe))
