"""The volume store: a folder of memory-mapped volumes at 1.5 mm with their labels and one index.

Preparation and the drawn volumes write it, the Dataset reads it; it follows the slice store
(dataset.slices) with volumes (X, Y, Z) in RAS order in place of slices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import write_json
from dataset.store.slices import (
    MAX_INDEX_BYTES,
    MAX_OPEN_CASES,
    SPLITS,
    Entry,
    check_classes,
    check_name,
    map_array,
    save_array,
    still_whole,
)

FORMAT = "volumes-1"
DTYPES = ("int16", "float32")
CASE_KEYS = {"id", "split", "file", "shape", "dtype", "spacing", "affine", "pixels", "boxes"}
CASE_KEYS |= {"objects", "patient", "dropped"}


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
    folder, file = Path(folder), check_name(entry.get("file"), f"{folder}: case file")
    if image.dtype.name not in DTYPES or mask.dtype != np.uint8 or image.shape != mask.shape:
        raise ValueError(
            f"case {file}: int16 or float32 image and uint8 mask of one shape wanted, found"
            f" {image.dtype} {image.shape} and {mask.dtype} {mask.shape}"
        )
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    save_array(folder / "cases" / f"{file}.image.npy", image)
    save_array(folder / "cases" / f"{file}.mask.npy", mask)
    boxes, pixels = measured(mask)
    present = [int(number) for number in boxes]
    blank = {"spacing": [1.5, 1.5, 1.5], "affine": None, "patient": entry.get("id"), "dropped": []}
    return {
        **blank,
        **entry,
        "shape": list(image.shape),
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
    """Path of the store's index, written last and at once, cases sorted by file name.

    What is written is checked as on reading.
    """
    path, cases = Path(folder) / "index.json", sorted(index["cases"], key=lambda c: c["file"])
    index = {**index, "format": FORMAT, "orientation": "RAS", "cases": cases}
    check_volume_index(index, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, index, indent=None)
    return path


def check_volume_index(index: object, where: str) -> None:
    """Raises ValueError, naming `where` and the case, unless `index` describes a sound store."""
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(
            f"{where}: a store of volumes ({FORMAT}) wanted, found {found!r:.40}; make one with"
            " python -m dataset.prepare volumes"
        )
    classes = check_classes(index.get("classes"), where)
    if not isinstance(index.get("cases"), list):
        raise ValueError(f"{where}: no list of cases")
    files = set()
    for case in index["cases"]:
        if not isinstance(case, dict) or CASE_KEYS - case.keys():
            raise ValueError(f"{where}: a case needs {', '.join(sorted(CASE_KEYS))}")
        name = check_name(case["file"], f"{where}: case file")
        _check_case(case, f"{where}: case {name}", len(classes))
        if name in files:
            raise ValueError(f"{where}: two cases named {name!r}")
        files.add(name)


def _check_case(case: Entry, where: str, num_classes: int) -> None:
    shape, texts = case["shape"], (case["id"], case["patient"])
    if not all(isinstance(text, str) for text in texts) or case["split"] not in SPLITS:
        raise ValueError(f"{where}: text id and patient and a split of {'/'.join(SPLITS)} wanted")
    if not (_is_voxel(shape) and min(shape) > 0 and case["dtype"] in DTYPES):
        raise ValueError(f"{where}: shape [X, Y, Z] and dtype {' or '.join(DTYPES)} wanted")
    boxes, pixels = case["boxes"], case["pixels"]
    lists = isinstance(case["objects"], list) and isinstance(case["dropped"], list)
    if not (lists and isinstance(boxes, dict) and isinstance(pixels, dict)):
        raise ValueError(
            f"{where}: tables of boxes and pixels, lists of objects and dropped wanted"
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


class VolumeStore:
    """A volume store opened for reading; volumes stay on disk until their voxels are asked for.

    Raises FileNotFoundError where there is no index, ValueError where it is not sound. It pickles
    without its open maps, so worker processes open their own.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no store of volumes in {self.folder} (index.json is missing); make one with"
                " python -m dataset.prepare volumes, or try --dataset phantom3d"
            )
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_INDEX_BYTES >> 20} MiB, not an index")
        text = path.read_bytes()
        try:
            self.index: Entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not readable as JSON ({error}); prepare it again") from None
        check_volume_index(self.index, str(path))
        self.digest = hashlib.sha256(text).hexdigest()
        self._maps: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def cases(self) -> list[Entry]:
        """Entries of the index, in order of file name; a case number is a place in this list."""
        return self.index["cases"]

    @property
    def classes(self) -> list[str]:
        """Class names by label id; the first is the background."""
        return [row["name"] for row in self.index["classes"]]

    @property
    def dtype(self) -> np.dtype:
        """What crops of any case come as: int16 if all images are, float32 otherwise."""
        return np.dtype(max((case["dtype"] for case in self.cases), default="int16", key=len))

    @property
    def dropped(self) -> list[str]:
        """One line for each structure that is no object: too small, or empty once resampled."""
        return [line for case in self.cases for line in case["dropped"]]

    def read(self, case_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Image int16 or float32 and mask uint8 (X, Y, Z) of a case, memory-mapped, read-only.

        Raises FileNotFoundError or ValueError, naming the file, for other arrays than the index's.
        """
        if case_number in self._maps:
            self._maps.move_to_end(case_number)
            return still_whole(self._maps[case_number])
        case = self.cases[case_number]
        stem, shape = self.folder / "cases" / case["file"], tuple(case["shape"])
        image = map_array(Path(f"{stem}.image.npy"), shape, case["dtype"])
        self._maps[case_number] = image, map_array(Path(f"{stem}.mask.npy"), shape)
        if len(self._maps) > MAX_OPEN_CASES:
            self._maps.popitem(last=False)
        return self._maps[case_number]

    def voxels(self, case_number: int, label: int) -> int:
        """How many voxels of a case carry the label."""
        return sum(self.cases[case_number]["pixels"].get(str(label), ()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}


def case_bytes(entry: Entry) -> tuple[int, int]:
    """Bytes of the case's image and mask without their headers."""
    voxels = math.prod(entry["shape"])
    return voxels * np.dtype(entry["dtype"]).itemsize, voxels
