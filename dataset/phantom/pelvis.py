"""CT slices of pelves drawn from a seed, with rectum and tumour labelled, as a slice store.

`--dataset phantom` draws it on first use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dataset.phantom.drawn import open_drawn
from dataset.phantom.outlines import cut, table
from dataset.phantom.patient import draw_anatomy
from dataset.phantom.shapes import Shape, Tissue
from dataset.store.folder import Entry, new_store
from dataset.store.slices import SliceStore, write_case, write_index
from dataset.text import counted

VERSION = 3  # raised whenever the same seed draws other pictures
SIZE = 224  # pixels a side, as the CARE release's slices
THICKNESS = 5.0  # mm, slice spacing
WINDOW = (-160, 240)  # HU, abdominal soft tissue
SUBSAMPLES = 2  # along each of x, y and z: a voxel averages 8 points
SHIFT = 4  # binary digits of a pixel's fraction in OpenCV's drawing functions
CLASSES = [
    {"id": 0, "name": "background", "color": "#000000"},
    {"id": 1, "name": "normal rectum", "color": "#2ca02c"},
    {"id": 2, "name": "tumour", "color": "#d62728"},
]
RECTUM = (Tissue.RECTAL_WALL, Tissue.RECTAL_FLUID, Tissue.RECTAL_STOOL, Tissue.RECTAL_GAS)

ENHANCING = (
    Tissue.GLAND,
    Tissue.BOWEL_WALL,
    Tissue.RECTAL_WALL,
    Tissue.RECTAL_FLUID,
    Tissue.RECTAL_STOOL,
    Tissue.TUMOUR,
)
ENHANCEMENT = 19  # HU, half the range over which dose and timing of contrast medium move these

# Tissue: mean HU, how much the mean differs between patients (standard deviation), and the
# texture's standard deviation, coarse and fine. Means: Buzug, Computed Tomography (2008), table
# of HU; for bone, urine and enhanced blood the ranges of Wikipedia's "Hounsfield scale". Tumours
# are drawn as after contrast medium and stand out from wall and contents by nearly 40 HU, more
# than most real ones, so that minutes of training suffice; they do not stand out from prostate,
# uterus and muscle, and differ between patients by as much, so that no threshold does.
HU = {
    Tissue.AIR: (-1000, 0, 0, 0),
    Tissue.SKIN: (10, 5, 0, 0),
    Tissue.FAT: (-103, 4, 5, 0),
    Tissue.DEEP_FAT: (-92, 5, 16, 0),
    Tissue.MUSCLE: (54, 4, 9, 5),
    Tissue.CORTEX: (750, 60, 60, 0),
    Tissue.MARROW: (185, 30, 40, 45),
    Tissue.URINE: (6, 4, 0, 0),
    Tissue.GLAND: (70, 5, 8, 4),
    Tissue.VESSEL: (95, 30, 0, 0),
    Tissue.BOWEL_WALL: (46, 5, 5, 0),
    Tissue.BOWEL_FLUID: (15, 6, 6, 0),
    Tissue.BOWEL_STOOL: (34, 14, 42, 26),
    Tissue.BOWEL_GAS: (-900, 0, 0, 0),
    Tissue.RECTAL_WALL: (38, 3, 5, 0),
    Tissue.RECTAL_FLUID: (15, 5, 8, 0),
    Tissue.RECTAL_STOOL: (19, 5, 24, 16),
    Tissue.RECTAL_GAS: (-900, 0, 0, 0),
    Tissue.TUMOUR: (76, 3, 7, 4),
    Tissue.TABLE: (350, 0, 0, 0),
}


def open_store(data_root: Path | str, **recipe: int) -> SliceStore:
    """The phantom below data_root, drawn there first where missing; see `open_drawn`."""
    return open_drawn("phantom", Path(data_root), SliceStore, build, version=VERSION, recipe=recipe)


def build(
    folder: Path | str,
    *,
    seed: int = 202307,
    train_cases: int = 96,
    test_cases: int = 12,
    num_slices: int = 8,
) -> Path:
    """Folder of a slice store with newly drawn patients; the same bytes for the same arguments.

    Every case is another patient, drawn from (seed, its number), so that train and test share
    none; more cases leave the earlier ones as they are. An earlier store there is replaced once
    the new one is whole. Raises ValueError for counts that leave nothing to draw.
    """
    if min(train_cases, test_cases) < 0 or train_cases + test_cases < 1 or num_slices < 1:
        raise ValueError(
            "phantom: expected at least one case of one slice, found"
            f" {counted(train_cases, 'training case')} and {counted(test_cases, 'test case')} of"
            f" {counted(num_slices, 'slice')}"
        )
    folder = Path(folder)
    planned = [("train", k) for k in range(train_cases)] + [("test", k) for k in range(test_cases)]
    cases = []
    with new_store(folder, "drawing the phantom", wait=True) as new:
        for split, number in tqdm(planned, desc="drawing phantom", unit="case"):
            entry, image, mask = draw_case(split, number, seed=seed, num_slices=num_slices)
            cases.append(write_case(new, entry, image, mask))
        facts = describe(seed, train_cases, test_cases, num_slices)
        write_index(new, {**facts, "cases": cases})
    return folder


def describe(seed: int, train_cases: int, test_cases: int, num_slices: int) -> Entry:
    """The index of a phantom store without its cases; `source` changes whenever a pixel could."""
    recipe = {
        "version": VERSION,
        "seed": seed,
        "train_cases": train_cases,
        "test_cases": test_cases,
        "num_slices": num_slices,
    }
    text = json.dumps(["phantom", recipe], sort_keys=True)
    return {
        "dataset": "phantom",
        "classes": CLASSES,
        "window": list(WINDOW),
        "orientation": "LPS",
        "clahe": True,
        "source": hashlib.sha256(text.encode()).hexdigest(),
        "recipe": recipe,
    }


def draw_case(
    split: str, number: int, *, seed: int = 202307, num_slices: int = 8
) -> tuple[Entry, NDArray[np.uint8], NDArray[np.uint8]]:
    """One patient: store entry, image and mask, uint8 (num_slices, SIZE, SIZE), lowest slice first.

    The patient depends on (seed, split, number) alone. Labels are CARE's ids; unlike in CARE,
    whose lumen counts as background where it holds air, the whole lumen is labelled 1.
    """
    generator = np.random.default_rng((seed, ("train", "val", "test").index(split), number))
    pixel = float(np.round(generator.uniform(1.58, 1.72), 3))
    lowest = generator.uniform(-24, 8)
    levels = lowest + THICKNESS * np.arange(num_slices)
    anatomy = draw_anatomy(generator, levels)
    lookup = _tissue_values(generator)
    dose = generator.uniform(6, 10)
    drawn = [_draw_slice(anatomy, z, pixel, lookup, dose, generator) for z in levels]
    edge = pixel * (SIZE - 1) / 2
    name = f"phantom_{split}_{number:04d}"
    entry = {
        "id": name,
        "split": split,
        "file": name,
        "slices": [f"{name}_slice{k}" for k in range(num_slices)],
        "spacing": [THICKNESS, pixel, pixel],
        "affine": [[-pixel, 0, 0, edge], [0, -pixel, 0, edge], [0, 0, THICKNESS, 0], [0, 0, 0, 1]],
    }
    image, mask = (np.stack(planes) for planes in zip(*drawn, strict=True))
    return entry, image, mask


def _draw_slice(anatomy, z, pixel, lookup, dose, generator):
    """Image and mask, uint8 (SIZE, SIZE), of the slice at height z mm; window WINDOW."""
    offsets = (np.arange(SUBSAMPLES) - (SUBSAMPLES - 1) / 2) * THICKNESS / 2 / SUBSAMPLES
    maps = [paint([*table(anatomy), *cut(anatomy, z + step)], pixel) for step in offsets]
    mean, coarse, fine = (
        sum(_shrink(cv2.LUT(plane, column)) for plane in maps) / len(maps) for column in lookup
    )
    values = mean + coarse * _noise(generator, 1.6) + fine * _noise(generator, 0.7)
    values = cv2.GaussianBlur(values, (0, 0), 0.55)  # the scanner's point spread
    values += _quantum_noise(generator, dose)
    low, high = WINDOW
    image = np.clip((values - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)
    return image, _label(maps)


def _label(maps: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Class ids (SIZE, SIZE): foreground if it fills half of a pixel; of two classes the larger."""
    table_ = np.zeros((2, 256), dtype=np.float32)
    table_[0, list(RECTUM)] = 1
    table_[1, Tissue.TUMOUR] = 1
    normal, tumour = (
        sum(_shrink(cv2.LUT(plane, row)) for plane in maps) / len(maps) for row in table_
    )
    inside = normal + tumour >= 0.5
    return (inside * np.where(tumour > normal, 2, 1)).astype(np.uint8)


def paint(shapes: Iterable[Shape], pixel: float) -> NDArray[np.uint8]:
    """Tissue map of the shapes, later ones over earlier ones, at SUBSAMPLES times SIZE.

    pixel is the size in mm of a pixel of the finished slice, whose centre is (0, 0) mm.
    """
    side = SIZE * SUBSAMPLES
    canvas = np.zeros((side, side), dtype=np.uint8)
    scale = SUBSAMPLES / pixel
    for tissue, points, width, closed in shapes:
        if not len(points):
            continue
        place = np.round((points * scale + (side - 1) / 2) * (1 << SHIFT)).astype(np.int32)
        if width:
            thickness = max(1, round(width * scale))
            cv2.polylines(canvas, [place], closed, int(tissue), thickness, cv2.LINE_8, SHIFT)
        else:
            cv2.fillPoly(canvas, [place], int(tissue), cv2.LINE_8, SHIFT)
    return canvas


def _shrink(plane):
    return cv2.resize(plane, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _tissue_values(generator):
    rows = np.zeros((256, 3), dtype=np.float32)
    for tissue, (mean, spread, coarse, fine) in HU.items():
        rows[tissue] = mean + spread * np.clip(generator.standard_normal(), -1.5, 1.5), coarse, fine
    rows[list(ENHANCING), 0] += generator.uniform(-ENHANCEMENT, ENHANCEMENT)
    return np.ascontiguousarray(rows.T)


def _noise(generator, sigma):
    field = generator.standard_normal((SIZE, SIZE), dtype=np.float32)
    return cv2.GaussianBlur(field, (0, 0), sigma) * np.float32(2 * np.sqrt(np.pi) * sigma)


def _quantum_noise(generator, dose):
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    depth = 0.45 + 0.8 * np.exp(-((x / 0.6) ** 2) - (y / 0.4) ** 2)
    streaks = cv2.GaussianBlur(
        generator.standard_normal((SIZE, SIZE), dtype=np.float32), (0, 0), sigmaX=9, sigmaY=0.7
    )
    band = np.exp(-(((y + 0.05) / 0.25) ** 2)) * 6
    return dose * depth * (_noise(generator, 0.6) + band * streaks)
