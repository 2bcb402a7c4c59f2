"""The slice store: a folder of memory-mapped uint8 slices with one index, written once.

Preparation, the phantom and readers of releases write it; the Dataset and `verify` read it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from dataset.labels import check_label_ids
from dataset.store.folder import Entry, Store, check_table, write_arrays, write_checked_index

FORMAT = 1
CASE_KEYS = {"id", "split", "file", "shape", "spacing", "affine", "slices", "listed", "pixels"}


class SliceStore(Store):
    """A slice store opened for reading, see Store."""

    what = "slice store"
    hint = "make one with python -m dataset.prepare, or try --dataset phantom"

    @staticmethod
    def check(index: object, where: str) -> None:
        """Raises ValueError, naming `where` and the case, unless `index` is valid."""
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            found = index.get("format") if isinstance(index, dict) else type(index).__name__
            if str(found).startswith("volumes-"):
                raise ValueError(f"{where}: a store of volumes; train on it with --model sam-med3d")
            raise ValueError(
                f"{where}: expected slice store format {FORMAT}, found {found!r:.40}; prepare it"
                " again"
            )
        num_classes = check_table(index, where, CASE_KEYS)
        for case in index["cases"]:
            _check_case(case, f"{where}: case {case['file']}", num_classes)

    def slices(self, split: str) -> list[tuple[int, int]]:
        """(case number, slice) of every slice of a split that the release's CSV names, in order."""
        return [
            place
            for number, case in enumerate(self.cases)
            if case["split"] == split
            for place in self.listed(number)
        ]

    def listed(self, case_number: int) -> list[tuple[int, int]]:
        """(case number, slice) of the slices of a case that the release's CSV names, in order."""
        shape, listed = (self.cases[case_number][key] for key in ("shape", "listed"))
        return [(case_number, k) for k in range(shape[0]) if listed is None or listed[k]]

    def read(self, case_number: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask of one slice, uint8 (H, W) each, memory-mapped and read-only.

        Raises FileNotFoundError or ValueError, naming the file, for arrays that are not what the
        index says or hold labels outside the class table.
        """
        image, mask = self.arrays(case_number)
        num_classes = len(self.index["classes"])
        if mask[k].max() >= num_classes:
            case = self.cases[case_number]
            where = f"{self.folder}: case {case['file']}, slice {case['slices'][k]}"
            check_label_ids(mask[k], num_classes, where)
        return image[k], mask[k]


def write_case(folder: Path | str, entry: Entry, image: np.ndarray, mask: np.ndarray) -> Entry:
    """The entry for the index, after writing the case's arrays below `folder`/cases.

    image, mask: uint8 (S, H, W). entry: at least id, split, file and slices (S names); shape,
    digests and pixels (count per label id per slice) are filled in, spacing, affine and listed
    default to None. Raises ValueError for other arrays.
    """
    for name, array in (("image", image), ("mask", mask)):
        if array.ndim != 3 or array.dtype != np.uint8 or array.shape != image.shape:
            raise ValueError(
                f"case {entry.get('file')}: {name} must be uint8 (S, H, W) of one shape,"
                f" found {array.dtype} {array.shape}"
            )
    if len(entry.get("slices", ())) != len(image):
        raise ValueError(f"case {entry.get('file')}: {len(image)} slices need as many names")
    num_labels = int(mask.max(initial=0)) + 1
    pixels = [np.bincount(plane.ravel(), minlength=num_labels).tolist() for plane in mask]
    blank = {"spacing": None, "affine": None, "listed": None}
    return {**blank, **entry, **write_arrays(folder, entry, image, mask), "pixels": pixels}


def write_index(folder: Path | str, index: Entry) -> Path:
    """Writes the store's index, see write_checked_index; counts are padded to the class table."""
    num_classes = len(index.get("classes", ()))
    cases = [
        {**case, "pixels": [row + [0] * (num_classes - len(row)) for row in case["pixels"]]}
        for case in index["cases"]
    ]
    index = {"format": FORMAT, **index, "cases": cases}
    return write_checked_index(folder, index, SliceStore)


def _check_case(case: Entry, where: str, num_classes: int) -> None:
    shape, names, listed = case["shape"], case["slices"], case["listed"]
    if not (
        isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    ):
        raise ValueError(f"{where}: expected shape [S, H, W], found {shape!r:.80}")
    if not (
        isinstance(names, list) and len(names) == shape[0] and all(type(n) is str for n in names)
    ):
        raise ValueError(f"{where}: expected {shape[0]} slice names")
    if listed is not None and not (isinstance(listed, list) and len(listed) == shape[0]):
        raise ValueError(f"{where}: expected {shape[0]} entries of 'listed', or null")
    spacing = case["spacing"]
    if spacing is not None and not _is_spacing(spacing):
        raise ValueError(
            f"{where}: expected spacing [z, y, x] in mm, or null, found {spacing!r:.80}"
        )
    pixels = case["pixels"]
    if not isinstance(pixels, list) or len(pixels) != shape[0]:
        raise ValueError(f"{where}: expected pixel counts of {shape[0]} slices")
    for row in pixels:
        if not (
            isinstance(row, list) and len(row) == num_classes and all(type(n) is int for n in row)
        ):
            raise ValueError(f"{where}: labels outside the {num_classes} classes of the table")


def _is_spacing(value: object) -> bool:
    numbers = isinstance(value, list) and all(type(n) in (int, float) for n in value)
    return numbers and len(value) == 3 and all(0 < n < math.inf for n in value)
