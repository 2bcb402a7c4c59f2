"""The volume store: a folder of memory-mapped volumes at 1.5 mm with their labels and one index.

Preparation and the drawn volumes write it, the Dataset reads it; it follows the slice store
(store.slices) with volumes (X, Y, Z) in RAS order in place of slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.store.folder import Entry, Store, check_table, write_arrays, write_checked_index

FORMAT = "volumes-1"
DTYPES = ("int16", "float32")
CASE_KEYS = {"id", "split", "file", "shape", "dtype", "spacing", "affine", "pixels", "boxes"}
CASE_KEYS |= {"objects", "patient", "dropped"}


class VolumeStore(Store):
    """A volume store opened for reading, see Store; `read` gives image and mask (X, Y, Z).

    Images are int16 or float32, masks uint8.
    """

    read = Store.arrays

    what = "store of volumes"
    hint = "make one with python -m dataset.prepare volumes, or try --dataset phantom3d"

    @staticmethod
    def check(index: object, where: str) -> None:
        """Raises ValueError, naming `where` and the case, unless `index` is valid."""
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            found = index.get("format") if isinstance(index, dict) else type(index).__name__
            raise ValueError(
                f"{where}: expected a store of volumes ({FORMAT}), found {found!r:.40}; make one"
                " with python -m dataset.prepare volumes"
            )
        num_classes = check_table(index, where, CASE_KEYS)
        for case in index["cases"]:
            _check_case(case, f"{where}: case {case['file']}", num_classes)

    @property
    def dtype(self) -> np.dtype:
        """The type of crops of all cases: int16 if all images are, float32 otherwise."""
        return np.dtype(max((case["dtype"] for case in self.cases), default="int16", key=len))

    @property
    def dropped(self) -> list[str]:
        """One line per structure that is not an object: too small, or empty after resampling."""
        return [line for case in self.cases for line in case["dropped"]]

    def voxels(self, case_number: int, label: int) -> int:
        """How many voxels of a case carry the label."""
        return sum(self.cases[case_number]["pixels"].get(str(label), ()))


def write_volume(
    folder: Path | str,
    entry: Entry,
    image: np.ndarray,
    mask: np.ndarray,
    *,
    objects: Sequence[int] | None = None,
) -> Entry:
    """The entry for the index, after writing the case's arrays below `folder`/cases.

    image int16 or float32, mask uint8 class ids, both (X, Y, Z). entry: at least id, split and
    file. objects: the ids worth segmenting, every id present if None. Filled in: shape, dtype,
    boxes ({id: [first voxel, one past the last]}), pixels ({id: count in each plane of its box
    along the first axis}) and objects. Raises ValueError for other arrays.
    """
    if image.dtype.name not in DTYPES or mask.dtype != np.uint8 or image.shape != mask.shape:
        raise ValueError(
            f"case {entry.get('file')}: expected an int16 or float32 image and a uint8 mask of one"
            f" shape, found {image.dtype} {image.shape} and {mask.dtype} {mask.shape}"
        )
    boxes, pixels = measured(mask)
    present = [int(number) for number in boxes]
    blank = {"spacing": [1.5, 1.5, 1.5], "affine": None, "patient": entry.get("id"), "dropped": []}
    return {
        **blank,
        **entry,
        **write_arrays(folder, entry, image, mask),
        "dtype": image.dtype.name,
        "pixels": pixels,
        "boxes": boxes,
        "objects": present if objects is None else [int(n) for n in objects if n in present],
    }


def measured(mask: np.ndarray) -> tuple[Entry, Entry]:
    """Boxes and counts per plane, {id: ...}, of each label but 0 in a mask uint8 (X, Y, Z)."""
    num_labels = int(mask.max(initial=0)) + 1
    counts = np.array([np.bincount(plane.ravel(), minlength=num_labels) for plane in mask])
    boxes, pixels = {}, {}
    for number in np.flatnonzero(counts.any(axis=0)[1:]) + 1:
        planes = np.flatnonzero(counts[:, number])
        spans = [(int(planes[0]), int(planes[-1]) + 1)]
        inside = mask[slice(*spans[0])] == number
        for axis in (1, 2):
            found = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
            spans.append((int(found[0]), int(found[-1]) + 1))
        boxes[str(number)] = [[low for low, _ in spans], [high for _, high in spans]]
        pixels[str(number)] = counts[slice(*spans[0]), number].tolist()
    return boxes, pixels


def write_volume_index(folder: Path | str, index: Entry) -> Path:
    """Writes the store's index, see write_checked_index."""
    index = {**index, "format": FORMAT, "orientation": "RAS"}
    return write_checked_index(folder, index, VolumeStore)


def _check_case(case: Entry, where: str, num_classes: int) -> None:
    shape = case["shape"]
    if not isinstance(case["patient"], str):
        raise ValueError(f"{where}: expected text as patient, found {case['patient']!r:.80}")
    if not (_is_voxel(shape) and min(shape) > 0 and case["dtype"] in DTYPES):
        raise ValueError(f"{where}: expected shape [X, Y, Z] and dtype {' or '.join(DTYPES)}")
    boxes, pixels = case["boxes"], case["pixels"]
    lists = isinstance(case["objects"], list) and isinstance(case["dropped"], list)
    if not (lists and isinstance(boxes, dict) and isinstance(pixels, dict)):
        raise ValueError(
            f"{where}: expected tables of boxes and pixels, lists of objects and dropped"
        )
    for number in case["objects"]:
        if not (type(number) is int and 0 < number < num_classes):
            raise ValueError(f"{where}: object {number!r:.40} is not in the class table")
        box, counts = boxes.get(str(number)), pixels.get(str(number))
        if not _is_box(box, shape):
            raise ValueError(f"{where}: object {number} has no box inside the volume")
        if not _are_counts(counts, box[1][0] - box[0][0], shape[1] * shape[2]):
            raise ValueError(f"{where}: object {number} has no voxel counts of its box's planes")


def _are_counts(value: object, length: int, most: int) -> bool:
    whole = isinstance(value, list) and all(type(n) is int and 0 <= n <= most for n in value)
    return whole and len(value) == length and any(value)


def _is_voxel(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(n) is int for n in value)


def _is_box(box: object, shape: list[int]) -> bool:
    if not (isinstance(box, list) and len(box) == 2 and all(map(_is_voxel, box))):
        return False
    return all(0 <= low < high <= size for low, high, size in zip(*box, shape, strict=True))
