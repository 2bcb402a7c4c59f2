"""CT slices drawn over real label maps: the shapes are real, the intensities are drawn by organ.

`python -m dataset.prepare anatomy` makes a slice store from a folder of label maps, for trials
where real scans are not available.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from dataset import word
from dataset.parallel import default_workers
from dataset.phantom.tissue import Patient, scanner_noise
from dataset.prepare.cases import pack_all, with_test_cases
from dataset.prepare.slices import write_splits
from dataset.prepare.sources import class_table
from dataset.scans.find import SCAN_SUFFIXES, scan_stem
from dataset.scans.orientation import SliceStack, to_canonical
from dataset.scans.read import read_label
from dataset.store.folder import Entry, check_class_names, new_store
from dataset.store.slices import write_case, write_index

VERSION = 1  # raised whenever the same seed draws other pictures
PIXEL = 2.0  # mm, of a finished slice
THICKNESS = 5.0  # mm, about; a whole number of the label's slices make one
WINDOW = (-160, 240)  # HU, abdominal soft tissue
NOISE = (14.0, 28.0)  # HU, standard deviation, drawn for each patient
SUBSAMPLES = 2  # along x and y: what partial volume is averaged from
MARGIN = (30.0, 25.0, 65.0)  # mm of patient around the labels: at the sides, in front, behind


@dataclass(frozen=True)
class Job:
    """One label file to draw a patient from, and the output folder."""

    label: Path
    output: Path
    names: list[str]
    seed: int

    @property
    def file(self) -> str:
        """Name of the case and of its files."""
        return scan_stem(self.label)


def build(
    labels: Path,
    output: Path,
    *,
    names: list[str] | None = None,
    test_fraction: float = 0.0,
    seed: int = 202307,
    workers: int | None = None,
    overwrite: bool = False,
) -> Entry:
    """The index of the slice store that `output` becomes; a patient for each label map.

    labels: a folder of label NIfTIs; names: of the labels 1, 2, ..., WORD's organs unless given.
    `test_fraction` of the cases are held out for testing. A patient depends on (seed, file name)
    alone. Raises FileNotFoundError where there are no label maps, ValueError for one that cannot be
    used.
    """
    files = _label_maps(labels)
    names = list(names or word.ORGANS)
    check_class_names(["background", *names], "anatomy")
    with new_store(output, "drawing patients", overwrite=overwrite) as new:
        jobs = [Job(file, new, names, seed) for file in files]
        drawn = pack_all(draw_case, jobs, workers or default_workers())
        index = {
            "dataset": "anatomy",
            "classes": class_table(names),
            "window": list(WINDOW),
            "orientation": "LPS",
            "clahe": False,
            "source": f"anatomy {VERSION} {seed} {zlib.crc32(' '.join(map(str, names)).encode())}",
            "cases": with_test_cases(drawn, test_fraction, seed),
        }
        write_splits(new, index["cases"], folds=None, seed=seed)
        write_index(new, index)
    return index


def _label_maps(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [f for f in found if f.name.endswith(SCAN_SUFFIXES) and not f.name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"anatomy: no label maps in {folder}; pass --input FOLDER")
    return files


def draw_case(job: Job) -> Entry:
    """The index entry of a patient drawn from a label map, with the arrays written."""
    volume = to_canonical(read_label(job.label, len(job.names) + 1))
    if volume.spacing is None or not volume.slices.any():
        raise ValueError(f"{job.label}: expected a label map with a voxel size and a label")
    rng = np.random.default_rng((job.seed, zlib.crc32(job.file.encode())))
    image, mask, affine = draw(volume, job.names, rng)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    entry = {
        "id": job.file,
        "split": "train",
        "file": job.file,
        "slices": [f"{job.file}_slice{k}" for k in range(len(image))],
        "spacing": spacing.tolist(),
        "affine": affine.tolist(),
    }
    return write_case(job.output, entry, image, mask)


def draw(
    volume: SliceStack, names: list[str], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Image and mask uint8 (S, side, side) and their affine, index (x, y, z) -> RAS mm.

    volume: canonical labels. Only heights with a label are drawn; the field of view is a square
    around the patient. A pixel averages SUBSAMPLES ** 2 points in each of the label's slices that
    make up the finished one, and its label is what fills most of it.
    """
    step = max(1, round(THICKNESS / volume.spacing[0]))
    labelled = np.flatnonzero(volume.slices.any(axis=(1, 2)))
    starts = np.arange(labelled[0], labelled[-1] - step + 2, step)
    if not len(starts):
        height = len(volume.slices) * volume.spacing[0]
        raise ValueError(f"labels span {height:g} mm, too little for slices of {THICKNESS:g} mm")
    box, body = _field_of_view(volume, rng)
    side = round(box[2] / PIXEL)
    height = (len(starts) * step + 1) * volume.spacing[0]
    patient = Patient(rng, names, (height, box[2], box[2]), body)
    sd = rng.uniform(*NOISE)
    images, masks = [], []
    for start in starts:
        planes = [_on_grid(volume, k, box, side * SUBSAMPLES) for k in range(start, start + step)]
        heights = (np.arange(start, start + step) - starts[0]) * volume.spacing[0]
        drawn = [patient.hounsfield(p, z) for p, z in zip(planes, heights, strict=True)]
        mean = np.mean([_shrunk(values, side) for values in drawn], axis=0)
        low, high = WINDOW
        noisy = mean + scanner_noise(rng, side, sd)
        images.append(np.clip((noisy - low) * (255 / (high - low)), 0, 255).round())
        masks.append(_majority(planes, side))
    pixel = box[2] / side
    origin = (box[0] / volume.spacing[2], box[1] / volume.spacing[1])  # in the label's pixels
    scale = np.array([pixel / volume.spacing[2], pixel / volume.spacing[1], step])
    shift = (*(o + (s - 1) / 2 for o, s in zip(origin, scale, strict=False)),
             starts[0] + (step - 1) / 2)  # fmt: skip
    affine = volume.affine @ nib.affines.from_matvec(np.diag(scale), shift)
    return np.stack(images).astype(np.uint8), np.stack(masks), affine


def _field_of_view(
    volume: SliceStack, rng: np.random.Generator
) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """A square (left, top, side) in mm from the label's corner, and the patient's half axes in mm.

    The patient reaches MARGIN beyond the labels, give or take a fifth.
    """
    seen = volume.slices.any(axis=0)
    _, y_size, x_size = volume.spacing
    x, y = np.flatnonzero(seen.any(axis=0)) * x_size, np.flatnonzero(seen.any(axis=1)) * y_size
    sides, front, back = np.array(MARGIN) * rng.uniform(0.8, 1.2, 3)
    left, right, top, bottom = x[0] - sides, x[-1] + sides, y[0] - front, y[-1] + back
    body = ((right - left) / 2, (bottom - top) / 2)
    side = 2.1 * max(body)
    return ((left + right - side) / 2, (top + bottom - side) / 2, side), body


def _on_grid(
    volume: SliceStack, k: int, box: tuple[float, float, float], side: int
) -> NDArray[np.uint8]:
    """Labels (side, side) of slice k inside box, each the nearest one; 0 outside the slice."""
    places = (np.arange(side) + 0.5) * (box[2] / side)  # mm from the box's corner
    rows = np.floor((box[1] + places) / volume.spacing[1]).astype(int)
    columns = np.floor((box[0] + places) / volume.spacing[2]).astype(int)
    height, width = volume.slices.shape[1:]
    label = volume.slices[k][np.clip(rows, 0, height - 1)][:, np.clip(columns, 0, width - 1)]
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return label * inside


def _shrunk(plane: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    return cv2.resize(plane, (side, side), interpolation=cv2.INTER_AREA)


def _majority(planes: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
    """The label (side, side) that fills most of each pixel."""
    found = np.unique(planes)
    shares = [
        sum(_shrunk((p == label).astype(np.float32), side) for p in planes) for label in found
    ]
    return found[np.argmax(shares, axis=0)].astype(np.uint8)
