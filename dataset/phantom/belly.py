"""CT volumes of abdomens drawn from a seed, with eight organs labelled, as a volume store.

`--dataset phantom3d` draws it on first use, so that SAM-Med3D runs without any data.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from dataset.phantom.drawn import open_drawn
from dataset.store.folder import new_store
from dataset.store.volumes import VolumeStore, write_volume, write_volume_index

VERSION = 1  # raised whenever the same seed draws other volumes
SIZE = 96  # voxels a side
SPACING = 1.5  # mm
KNOTS = 7  # of the smooth fields that bend the anatomy, along each axis
CLASSES = [
    {"id": number, "name": name, "color": color}
    for number, (name, color) in enumerate(
        [
            ("background", "#000000"),
            ("liver", "#a65628"),
            ("stomach", "#ff7f00"),
            ("left kidney", "#377eb8"),
            ("right kidney", "#4daf4a"),
            ("aorta", "#e41a1c"),
            ("duodenum", "#984ea3"),
            ("small bowel", "#f0e442"),
            ("colon", "#f781bf"),
        ]
    )
]
LIVER, STOMACH, LEFT_KIDNEY, RIGHT_KIDNEY, AORTA, DUODENUM, SMALL_BOWEL, COLON = range(1, 9)
AIR, FAT, MUSCLE, BONE, WALL = -1000.0, -100.0, 55.0, 320.0, 95.0  # HU
# Organ: middle (x, y, z) and radii, voxels, RAS. Larger ones first: a later organ takes its place
# from an earlier one, so that neighbours touch.
ORGANS = {
    LIVER: ((64, 55, 67), (20, 20, 17)),
    STOMACH: ((35, 60, 66), (16, 14, 15)),
    LEFT_KIDNEY: ((28, 31, 47), (9, 9, 13)),
    RIGHT_KIDNEY: ((67, 31, 44), (9, 9, 13)),
}
# Six loops of gut, two of each kind in any of these places. Nothing but a click tells whose loop
# is whose: one click gives one loop, further clicks the other.
GUT = (DUODENUM, SMALL_BOWEL, COLON)
LOOPS = tuple((x, 56, z) for z in (15, 36) for x in (27, 47, 67))
LOOP_RADII = (11, 14, 11)
SHIFT, STRETCH = 2.0, 0.1  # of a middle (voxels) and of radii (share), standard deviations
ENHANCED = (70.0, 130.0)  # HU of solid organs, drawn for each patient and organ
BLOOD = (140.0, 220.0)
CONTENT = (10.0, 60.0)  # of the gut, drawn for each loop
NOISE = 14.0  # HU


def open_store(data_root: Path | str, **recipe: int) -> VolumeStore:
    """The drawn volumes below data_root, drawn there first where missing; see `open_drawn`."""
    return open_drawn(
        "phantom3d", Path(data_root), VolumeStore, build, version=VERSION, recipe=recipe
    )


def build(
    folder: Path | str,
    *,
    seed: int = 202307,
    train_cases: int = 48,
    val_cases: int = 6,
    test_cases: int = 6,
) -> Path:
    """Folder of a volume store with newly drawn patients; the same bytes for the same arguments.

    Every case is another patient, drawn from (seed, split, its number), so no two splits share
    one. An earlier store there is replaced once the new one is whole. Raises ValueError for
    counts that leave nothing to draw.
    """
    counts = {"train": train_cases, "val": val_cases, "test": test_cases}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError(f"phantom3d: expected at least one case, found {counts}")
    folder = Path(folder)
    recipe = {"version": VERSION, "seed": seed, **{f"{k}_cases": n for k, n in counts.items()}}
    planned = [(split, number) for split, count in counts.items() for number in range(count)]
    cases = []
    text = json.dumps(["phantom3d", recipe], sort_keys=True)
    index = {
        "dataset": "phantom3d",
        "classes": CLASSES,
        "source": hashlib.sha256(text.encode()).hexdigest(),
        "recipe": recipe,
        "cases": cases,
    }
    with new_store(folder, "drawing the phantom", wait=True) as new:
        for split, number in tqdm(planned, desc="drawing volumes", unit="case"):
            image, mask = draw_case(split, number, seed=seed)
            name = f"phantom3d_{split}_{number:04d}"
            entry = {"id": name, "split": split, "file": name, "affine": affine().tolist()}
            cases.append(write_volume(new, entry, image, mask))
        write_volume_index(new, index)
    return folder


def affine() -> NDArray[np.float64]:
    """(4, 4) from a drawn volume's index to RAS mm; 0 mm is its middle."""
    matrix = np.diag([SPACING, SPACING, SPACING, 1.0])
    matrix[:3, 3] = -SPACING * (SIZE - 1) / 2
    return matrix


def draw_case(
    split: str, number: int, *, seed: int = 202307
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """One patient: image int16 HU and mask uint8 class ids, (SIZE, SIZE, SIZE) in RAS order.

    The patient depends on (seed, split, number) alone.
    """
    rng = np.random.default_rng((seed, ("train", "val", "test").index(split), number))
    axes = np.meshgrid(*[np.arange(SIZE, dtype=np.float32)] * 3, indexing="ij", sparse=True)
    place = [axis + smooth_field(rng, 2.2) for axis in axes]  # every outline is uneven
    depth = ellipsoid(place, (47.5, 46, 47.5), (43, 36, 1e6))
    image = np.where(depth < 1, np.where(depth < 0.87, MUSCLE, FAT), AIR).astype(np.float32)
    image[ellipsoid(place, (47.5, 45, 47.5), (37, 29, 1e6)) < 1] = FAT  # around the organs
    image[ellipsoid(place, (47.5, 19, 47.5), (8, 8, 1e6)) < 1] = BONE
    mask = draw_organs(rng, place, image)
    labelled = mask > 0
    image[labelled] += smooth_field(rng, 6.0, knots=24)[labelled]  # texture
    image = blurred(image) + NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(image).clip(-1024, 3071).astype(np.int16), mask


def draw_organs(
    rng: np.random.Generator, place: list[NDArray], image: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Class ids (SIZE, SIZE, SIZE), and the organs' HU painted into the image.

    place holds each voxel's bent coordinates, three arrays.
    """
    mask = np.zeros(image.shape, dtype=np.uint8)
    cavity = ellipsoid(place, (47.5, 45, 47.5), (36, 28, 1e6)) < 1
    kidneys = rng.uniform(*BLOOD)
    for organ, (middle, radii) in ORGANS.items():
        inside = (varied(rng, place, middle, radii) < 1) & cavity
        solid = rng.uniform(*ENHANCED)
        mask[inside] = organ
        image[inside] = kidneys if organ in (LEFT_KIDNEY, RIGHT_KIDNEY) else solid
    for organ, middle in zip(rng.permutation(GUT * 2), LOOPS, strict=True):
        field = varied(rng, place, middle, LOOP_RADII)
        inside = (field < 1) & cavity
        mask[inside] = organ
        image[inside] = np.where(field[inside] < 0.7, rng.uniform(*CONTENT), WALL)
    bend = 4 * np.sin(place[2] / SIZE * 2 * np.pi + rng.uniform(0, 2 * np.pi))
    tube = np.square(place[0] - 46 - bend) + np.square(place[1] - 32)
    inside = tube < np.square(rng.uniform(5.5, 7.0))
    mask[inside] = AORTA
    image[inside] = rng.uniform(*BLOOD)
    return mask


def varied(
    rng: np.random.Generator, place: list[NDArray], middle: ArrayLike, radii: ArrayLike
) -> NDArray[np.float32]:
    """An ellipsoid's field with this patient's middle and radii."""
    middle = np.asarray(middle) + rng.normal(0, SHIFT, 3)
    radii = np.asarray(radii) * np.exp(rng.normal(0, STRETCH, 3))
    return ellipsoid(place, middle, radii)


def ellipsoid(place: list[NDArray], middle: ArrayLike, radii: ArrayLike) -> NDArray[np.float32]:
    """Squared distance from the middle in radii, broadcast over the coordinates: below 1 inside."""
    parts = zip(place, middle, radii, strict=True)
    return sum(np.square((axis - centre) / radius) for axis, centre, radius in parts)


def smooth_field(
    rng: np.random.Generator, deviation: float, knots: int = KNOTS
) -> NDArray[np.float32]:
    """A random field (SIZE, SIZE, SIZE) without sharp changes, of the given standard deviation."""
    where = np.arange(SIZE) / (SIZE - 1) * (knots - 1)
    basis = np.exp(-np.square(where[:, None] - np.arange(knots)) / 1.2).astype(np.float32)
    basis /= np.sqrt(np.square(basis).sum(axis=1, keepdims=True))
    field = rng.standard_normal((knots, knots, knots), dtype=np.float32)
    for _ in range(3):  # each turn smooths the first axis and moves it last
        field = np.tensordot(field, basis, axes=(0, 1))
    return deviation * field


def blurred(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The image with half of each neighbour mixed in along each axis: the scanner's sharpness."""
    for axis in range(3):
        before, after = (np.roll(image, step, axis) for step in (1, -1))
        image = 0.5 * image + 0.25 * (before + after)
    return image
