"""The torch Dataset over a slice store: contrast, size, and which slices belong to a split.

`build_dataset` makes it; loaders collate its items into `{"image", "mask", "id"}` batches.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.store.folder import Store
from dataset.store.slices import SliceStore

TILES = (8, 8)
CLIP_LIMIT = 2.0  # evaluation
CLIP_LIMITS = (1.0, 4.0)  # training draws between these

# Workers run side by side already, and OpenCV's threads do not survive the fork into one.
cv2.setNumThreads(0)

Slices = list[tuple[int, int]]


def equalize(image: np.ndarray, clip_limit: float = CLIP_LIMIT) -> np.ndarray:
    """CLAHE of a uint8 (H, W) image on 8 x 8 tiles, as U-SAM was trained; uint8 (H, W)."""
    return cv2.createCLAHE(clipLimit=clip_limit, tileGridSize=TILES).apply(image)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W) -> uint8 (size, size), cubic; the same array if that is its size."""
    if image.shape == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Labels uint8 (H, W) -> uint8 (size, size), the nearest label, aligned with the image."""
    if mask.shape == (size, size):
        return mask
    # INTER_NEAREST takes the corner of each pixel, half a pixel off the cubic image.
    return cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def with_foreground(store: SliceStore, slices: Slices) -> Slices:
    """Those of `slices` that hold any label besides the background."""
    return [(number, k) for number, k in slices if any(store.cases[number]["pixels"][k][1:])]


def thin_out_empty(store: SliceStore, slices: Slices, share: float, seed: int) -> Slices:
    """`slices` with empty ones dropped at random, by `seed`, until they are `share` of all.

    share: 0 keeps none, 1 keeps all; fewer than `share` asks for stay as they are.
    """
    full = with_foreground(store, slices)
    empty = sorted(set(slices) - set(full))
    if share >= 1 or not empty:
        return slices
    number = min(len(empty), round(len(full) * share / (1 - share)))
    drawn = np.random.default_rng(seed).permutation(len(empty))[:number]
    kept = {*full, *(empty[index] for index in drawn)}
    return [place for place in slices if place in kept]


def spread(number: int, total: int) -> list[int]:
    """Up to `number` evenly spaced indices in 0 .. total - 1."""
    number = min(number, total)
    return [total * i // number for i in range(number)]


class StoreDataset(Dataset):
    """A Dataset over a store of slices or volumes.

    places: (case number, slice or class id) of each item. held_out: the training cases that
    validate, where they were drawn, see splits.held_out_ids.
    """

    def __init__(
        self, store: Store, places: list[tuple[int, int]], seed: int, held_out: list[str] | None
    ) -> None:
        self.store = store
        self.places = places
        self.seed = seed
        self.held_out = held_out

    def __len__(self) -> int:
        return len(self.places)

    @property
    def classes(self) -> list[str]:
        """Class names by label id; the first is the background."""
        return self.store.classes

    @property
    def case_numbers(self) -> set[int]:
        """The store indices of the cases these items come from."""
        return {number for number, _ in self.places}

    @property
    def case_ids(self) -> list[str]:
        """The cases these items come from, each once, sorted."""
        return sorted({self.store.cases[number]["id"] for number in self.case_numbers})

    @property
    def case_digests(self) -> dict[str, str]:
        """Digest of the stored images of each of these cases, by case id."""
        return self.store.case_digests(self.case_numbers)

    @property
    def classes_not_shown(self) -> list[str]:
        """The foreground classes that none of these cases show."""
        shown = set().union(*(self.store.shown(number) for number in self.case_numbers))
        return [name for label, name in enumerate(self.classes) if label and label not in shown]

    def describe(self, **facts: Any) -> dict[str, Any]:
        """What checkpoints of both systems keep of their data, followed by `facts`."""
        return {
            "dataset": self.store.index.get("dataset"),
            "classes": self.classes,
            "colors": [row.get("color") for row in self.store.index["classes"]],
            **facts,
            "digest": self.store.digest,
        }


def neighbours(k: int, num_slices: int) -> list[int]:
    """The slices that 2.5D input shows for slice k: the one before, k, the one after.

    The first and the last slice of a case stand in for the neighbour they lack.
    """
    return [max(k - 1, 0), k, min(k + 1, num_slices - 1)]


class SliceDataset(StoreDataset):
    """Items `{"image": uint8 (C, H, W), "mask": uint8 (H, W), "id": str}` of a store's slices.

    `dataset[index]` is the same every time (CLAHE at clip limit 2.0); `dataset[index, epoch]` is
    the training draw, random by (seed, epoch, index) alone, so workers change nothing; without
    `random_contrast` it is the same as `dataset[index]`. CLAHE runs
    at the stored size, where the store asks for it; then the slice becomes img_size x img_size.
    `crop` is the share of the side cut off at each edge first. C is 1 for input_mode "2d", 3 for
    "2.5d": the slice between its neighbours in the case, whether those are of the data set or not.
    fold_digest: of the fold these slices are of, see `splits.fold_digest`; None without one.
    """

    def __init__(
        self,
        store: SliceStore,
        slices: Slices,
        *,
        img_size: int = 224,
        seed: int = 202307,
        crop: float = 0.0,
        input_mode: str = "2d",
        random_contrast: bool = True,
        fold_digest: str | None = None,
        held_out: list[str] | None = None,
    ) -> None:
        super().__init__(store, slices, seed, held_out)
        self.fold_digest = fold_digest
        self.img_size = img_size
        self.crop = crop
        self.input_mode = input_mode
        self.random_contrast = random_contrast
        self.clahe = bool(store.index.get("clahe", False))

    @property
    def slices(self) -> Slices:
        """(case number, slice) of each item."""
        return self.places

    @property
    def info(self) -> dict[str, Any]:
        """What a checkpoint must keep, so that prediction prepares a scan as training did."""
        index = self.store.index
        return self.describe(
            img_size=self.img_size,
            input=self.input_mode,
            window=index.get("window", "percentile"),
            orientation=index.get("orientation", "LPS"),
            spacing=index.get("spacing"),
            clahe=self.clahe,
            crop=self.crop,
            body_crop=bool(index.get("body_crop", False)),
            fold_digest=self.fold_digest,
        )

    @property
    def class_pixels(self) -> list[int]:
        """Pixels of each class in these slices, as stored."""
        return np.sum([self.store.cases[n]["pixels"][k] for n, k in self.places], axis=0).tolist()

    @property
    def by_class(self) -> list[np.ndarray]:
        """Indices of the slices that hold each foreground class, one sorted array per class."""
        pixels = np.array([self.store.cases[n]["pixels"][k] for n, k in self.places])
        return [np.flatnonzero(column) for column in pixels.T[1:]]

    def showcase(self, number: int) -> list[int]:
        """Up to `number` indices for pictures: the slices with most classes, spread evenly."""
        pixels = [self.store.cases[case]["pixels"][k] for case, k in self.places]
        shown = [sum(count > 0 for count in counts[1:]) for counts in pixels]
        richest = [index for index, classes in enumerate(shown) if classes == max(shown)]
        return [richest[place] for place in spread(number, len(richest))]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, None)
        number, k = self.places[index]
        clip_limit = CLIP_LIMIT
        if epoch is not None and self.random_contrast:
            rng = np.random.default_rng((self.seed, epoch, index))
            clip_limit = float(rng.uniform(*CLIP_LIMITS))
        image, mask = (self._cropped(array) for array in self.store.read(number, k))
        # Copied where nothing changed it yet: what lies in the store's map cannot be written to.
        channels = np.array(self._channel(image, clip_limit))[None]
        if self.input_mode == "2.5d":
            channels = self._between_neighbours(channels[0], number, k, clip_limit)
        return {
            "image": torch.from_numpy(channels),
            "mask": torch.from_numpy(np.array(resize_mask(mask, self.img_size))),
            "id": self.store.cases[number]["slices"][k],
        }

    def _between_neighbours(
        self, channel: np.ndarray, number: int, k: int, clip_limit: float
    ) -> np.ndarray:
        """(3, H, W): slice k, given as `channel`, between its neighbours, with one CLAHE limit."""
        known = {k: channel}
        shown = neighbours(k, self.store.cases[number]["shape"][0])
        for other in shown:
            if other not in known:
                plane = self._cropped(self.store.read(number, other)[0])
                known[other] = self._channel(plane, clip_limit)
        return np.stack([known[other] for other in shown])

    def seen_box(self, index: int) -> tuple[int, int, int, int]:
        """The part (y0, y1, x0, x1), ends excluded, of stored slice `index` that its item shows."""
        height, width = self.store.cases[self.places[index][0]]["shape"][1:]
        top, left = round(height * self.crop), round(width * self.crop)
        return top, height - top, left, width - left

    def _cropped(self, plane: np.ndarray) -> np.ndarray:
        top, left = (round(side * self.crop) for side in plane.shape)
        return plane[top : plane.shape[0] - top, left : plane.shape[1] - left]

    def _channel(self, plane: np.ndarray, clip_limit: float) -> np.ndarray:
        if self.clahe:
            plane = equalize(plane, clip_limit)
        return resize_image(plane, self.img_size)
