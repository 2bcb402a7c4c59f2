"""The torch Dataset over a volume store: one object of one case, in a cube around it.

`build_volumes` makes it for SAM-Med3D; loaders collate its items into {"image", "mask", "id"}.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset.crops import box_origin, crop_at
from dataset.phantom import belly as phantom3d
from dataset.prepare import volumes as volume_packing
from dataset.prepare.volume_sources import LAYOUT
from dataset.slices import StoreDataset, spread
from dataset.splits import case_numbers, held_out_ids
from dataset.store.volumes import VolumeStore

Objects = list[tuple[int, int]]  # (case number, class id)


class VolumeSource(NamedTuple):
    """A source of volumes: how its store is opened (and made), and the default folder."""

    open: Callable[..., VolumeStore]
    root: str | None = None


VOLUMES = {
    "volumes": VolumeSource(volume_packing.open_store),
    "phantom3d": VolumeSource(phantom3d.open_store, "data/phantom3d"),
}


def open_volumes(
    name: str, data_root: Path | str | Sequence[Path | str] | None = None, **extra: Any
) -> VolumeStore:
    """The volume store of a data set, made on first use where its source needs that.

    data_root: a store, or for "volumes" one or more folders in SAM-Med3D's layout. Of several
    processes, one should call this before the others do. Raises ValueError for an unknown name,
    FileNotFoundError where there is no data.
    """
    if name not in VOLUMES:
        raise ValueError(f"dataset {name!r} holds no volumes; expected one of {', '.join(VOLUMES)}")
    root = data_root if data_root is not None else VOLUMES[name].root
    if root is None:
        raise ValueError(f"dataset {name}: --data_root must name a prepared store or {LAYOUT}")
    return VOLUMES[name].open(root, **extra)


def build_volumes(
    name: str,
    split: str,
    *,
    data_root: Path | str | Sequence[Path | str] | None = None,
    side: int = 128,
    seed: int = 202307,
    val_fraction: float = 0.1,
    only: Sequence[str] | None = None,
    flips: bool = True,
    store: VolumeStore | None = None,
    held_out: Collection[str] | None = None,
    stratified: bool = True,
    **extra: Any,
) -> VolumeDataset:
    """The objects of a split ("train", "val", "test") as a Dataset; see VolumeDataset for items.

    only: class names to keep. held_out, stratified: see build_dataset, with the ids of patients.
    Validation may be empty (too few patients); training and test may
    not: FileNotFoundError. Raises ValueError for an unknown class name or split.
    """
    store = store or open_volumes(name, data_root, **extra)
    if held_out is None:
        how = {"seed": seed, "val_fraction": val_fraction, "stratified": stratified}
        held_out = held_out_ids(store, **how)
    cases = case_numbers(store, split, val_fraction=val_fraction, held=held_out)
    wanted = class_ids(store, only)
    objects = [(n, c) for n in cases for c in store.cases[n]["objects"] if c in wanted]
    if not objects and (split != "val" or val_fraction == 0):
        sought = "test" if split == "val" else split
        hint = "; prepare it with --test_fraction 0.2" if sought == "test" else ""
        raise FileNotFoundError(f"dataset {name}: no {sought} objects in {store.folder}{hint}")
    return VolumeDataset(
        store, objects, side=side, seed=seed, flips=flips, held_out=sorted(held_out)
    )


def class_ids(store: VolumeStore, names: Sequence[str] | None) -> list[int]:
    """Ids of the named classes, of all but the background if None; ValueError for other names."""
    if names is None:
        return list(range(1, len(store.classes)))
    unknown = [name for name in names if name not in store.classes[1:]]
    if unknown:
        raise ValueError(
            f"class {unknown[0]!r} is not in {store.folder}; it holds"
            f" {', '.join(store.classes[1:])}"
        )
    return sorted(store.classes.index(name) for name in names)


class VolumeDataset(StoreDataset):
    """Items {"image": (1, S, S, S), "mask": uint8 (S, S, S), "id": str} of a store's objects.

    image is int16 or float32 as the store's dtype, in the scan's own units (see crops.normalise);
    mask is 1 in the object. `dataset[index]` is one object of one case, in the published place:
    the cube around the middle of its box. `dataset[index, epoch]` is the training draw, random by
    (seed, epoch, index) alone: of that case's objects any, flipped along any axis, and one of its
    voxels as often in the middle, where prediction puts a first click, as anywhere else but near
    the faces, where windows that grow meet it. Published training centres the object instead, so
    that a network learns the middle and not the clicks. The object is never empty in its cube.
    Axes are RAS (x, y, z), at 1.5 mm, zero outside the scan.
    """

    def __init__(
        self,
        store: VolumeStore,
        objects: Objects,
        *,
        side: int = 128,
        seed: int = 202307,
        flips: bool = True,
        held_out: list[str] | None = None,
    ) -> None:
        super().__init__(store, objects, seed, held_out)
        self.side = side
        self.flips = flips
        self._dtype = store.dtype
        self._of_case: dict[int, list[int]] = {}
        for number, class_id in objects:
            self._of_case.setdefault(number, []).append(class_id)

    @property
    def objects(self) -> Objects:
        """(case number, class id) of each item."""
        return self.places

    @property
    def skipped(self) -> list[str]:
        """One line for each structure of the store that is not an object, with the reason."""
        return self.store.dropped

    @property
    def info(self) -> dict[str, Any]:
        """What a checkpoint must keep, so that prediction prepares a scan as training did."""
        return self.describe(
            img_size=self.side,
            window=None,
            orientation="RAS",
            spacing=1.5,
            normalise="crop, voxels > 0",
        )

    def showcase(self, number: int) -> list[int]:
        """Up to `number` indices for pictures, spread evenly."""
        return spread(number, len(self.objects))

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, None)
        number, class_id = self.objects[index]
        flipped: list[int] = []
        if epoch is None:
            origin = self._place(number, class_id)
        else:
            rng = np.random.default_rng((self.seed, epoch, index))
            class_id = int(rng.choice(self._of_case[number]))
            origin = self._draw_place(number, class_id, rng)
            flipped = [axis for axis in range(3) if self.flips and rng.random() < 0.5]
        image, mask = (crop_at(volume, origin, self.side) for volume in self.store.read(number))
        image = np.flip(image.astype(self._dtype, copy=False), flipped)[None]
        mask = np.flip(mask == class_id, flipped)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "mask": torch.from_numpy(mask.astype(np.uint8)),
            "id": f"{self.store.cases[number]['id']}:{self.classes[class_id]}",
        }

    def _box(self, number: int, class_id: int) -> np.ndarray:
        return np.array(self.store.cases[number]["boxes"][str(class_id)])

    def _place(self, number: int, class_id: int) -> np.ndarray:
        low, high = self._box(number, class_id)
        origin = box_origin(low, high, self.side)
        if (high - low <= self.side).all():
            return origin
        return self._holding(origin, self._inner_voxel(number, class_id))

    def _draw_place(self, number: int, class_id: int, rng: np.random.Generator) -> np.ndarray:
        voxel = self._random_voxel(number, class_id, rng)
        if rng.random() < 0.5:
            return voxel - self.side // 2
        margin = self.side // 8
        return voxel - rng.integers(margin, self.side - margin, 3)

    def _holding(self, origin: np.ndarray, voxel: np.ndarray) -> np.ndarray:
        """The cube origin nearest to `origin` whose cube contains the voxel."""
        return np.clip(origin, voxel - self.side + 1, voxel)

    def _random_voxel(self, number: int, class_id: int, rng: np.random.Generator) -> np.ndarray:
        """Any voxel (3,) of an object, each with equal chance; reads one plane."""
        counts = np.array(self.store.cases[number]["pixels"][str(class_id)])
        x = self._box(number, class_id)[0, 0] + rng.choice(len(counts), p=counts / counts.sum())
        found = self._in_plane(number, class_id, x)
        return np.array([x, *found[rng.integers(len(found))]])

    def _inner_voxel(self, number: int, class_id: int) -> np.ndarray:
        """The voxel (3,) nearest to the object's middle in the plane that shows most of it."""
        counts = self.store.cases[number]["pixels"][str(class_id)]
        x = self._box(number, class_id)[0, 0] + np.argmax(counts)
        found = self._in_plane(number, class_id, x)
        distance = np.square(found - found.mean(axis=0)).sum(axis=1)
        return np.array([x, *found[distance.argmin()]])

    def _in_plane(self, number: int, class_id: int, x: int) -> np.ndarray:
        found = np.argwhere(self.store.read(number)[1][x] == class_id)
        if not len(found):
            case = self.store.cases[number]["file"]
            raise ValueError(f"{self.store.folder}: case {case}: mask and index differ")
        return found
