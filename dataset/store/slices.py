"""The slice store: a folder of memory-mapped uint8 slices with one index, written once.

Preparation, the phantom and readers of releases write it; the Dataset and `verify` read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import atomic_write, write_text

FORMAT = 1
SPLITS = ("train", "val", "test")
CASE_KEYS = {"id", "split", "file", "shape", "spacing", "affine", "slices", "listed", "pixels"}
MAX_OPEN_CASES = 512  # two maps each; far below Linux's 65,530 maps a process
MAX_INDEX_BYTES = 256 << 20  # 33,000 slices of 17 classes take about 5 MB
HEADER_BYTES = 4096  # an npy header of a plain array is 118 bytes long

Entry = dict[str, Any]


def npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, Fortran order, dtype, bytes before the data) from the first bytes of an npy file.

    `head` should hold the first HEADER_BYTES: the length a header claims is then never believed.
    Raises ValueError for anything that is not an npy header of version 1 or 2.
    """
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"npy version {version}, not 1.0 or 2.0")
    except Exception as error:  # hostile headers make numpy raise nearly anything
        raise ValueError(f"not an npy array: {error!s:.200}") from None
    return shape, fortran, dtype, stream.tell()


def check_name(name: object, where: str) -> str:
    """`name` itself if it is one plain file name; raises ValueError naming `where` otherwise.

    Absolute names, folders, `..`, a leading dot, NUL and over 200 characters are refused.
    """
    plain = isinstance(name, str) and 0 < len(name) <= 200 and not name.startswith(".")
    if not plain or any(c in name for c in "/\\:\0"):
        raise ValueError(f"{where}: {name!r:.80} is not a plain file name (no folders, no '..')")
    return name


def write_case(folder: Path | str, entry: Entry, image: np.ndarray, mask: np.ndarray) -> Entry:
    """The entry for the index, after writing the case's arrays below `folder`/cases.

    image, mask: uint8 (S, H, W). entry: at least id, split, file and slices (S names); shape and
    pixels (count per label id per slice) are filled in, spacing, affine and listed default to None.
    Each array appears under its name only when complete. Raises ValueError for other arrays.
    """
    folder, file = Path(folder), check_name(entry.get("file"), f"{folder}: case file")
    for name, array in (("image", image), ("mask", mask)):
        if array.ndim != 3 or array.dtype != np.uint8 or array.shape != image.shape:
            raise ValueError(
                f"case {file}: {name} must be uint8 (S, H, W) of one shape,"
                f" found {array.dtype} {array.shape}"
            )
    if len(entry.get("slices", ())) != len(image):
        raise ValueError(f"case {file}: {len(image)} slices need as many names")
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    save_array(folder / "cases" / f"{file}.image.npy", image)
    save_array(folder / "cases" / f"{file}.mask.npy", mask)
    num_labels = int(mask.max(initial=0)) + 1
    pixels = [np.bincount(plane.ravel(), minlength=num_labels).tolist() for plane in mask]
    blank = {"spacing": None, "affine": None, "listed": None}
    return {**blank, **entry, "shape": list(image.shape), "pixels": pixels}


def write_index(folder: Path | str, index: Entry) -> Path:
    """Path of the store's index, written last and at once: a store is whole or has no index.

    Cases are sorted by file name, counts are padded to the class table, and what is written is
    checked as on reading. Raises ValueError, e.g. for a label outside the class table.
    """
    folder = Path(folder)
    num_classes = len(index.get("classes", ()))
    cases = [
        {**case, "pixels": [row + [0] * (num_classes - len(row)) for row in case["pixels"]]}
        for case in sorted(index["cases"], key=lambda case: case["file"])
    ]
    index = {**index, "format": index.get("format", FORMAT), "cases": cases}
    path = folder / "index.json"
    check_index(index, str(path))
    text = json.dumps(index, sort_keys=True, separators=(",", ":"), allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def move_into_place(scratch: Path, target: Path) -> None:
    """Renames a finished store to `target`, in place of an older one; never a mixture of the two.

    When another process is quicker with the very same store, its copy stays and ours goes. Raises
    ValueError where `target` holds anything but a store: only stores are ever replaced.
    """
    ours = (scratch / "index.json").read_bytes()
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    while True:
        try:
            scratch.rename(target)
            return
        except OSError:
            if not target.is_dir():
                raise
        with contextlib.suppress(FileNotFoundError):  # another process is replacing it, too: again
            if not (target / "index.json").is_file() and any(target.iterdir()):
                raise ValueError(f"{target} is in the way: not a slice store; move it elsewhere")
            if (target / "index.json").read_bytes() == ours:
                shutil.rmtree(scratch)
                return
            target.rename(aside)
            shutil.rmtree(aside)


def check_index(index: object, where: str) -> None:
    """Raises ValueError, naming `where` and the case, unless `index` describes a sound store."""
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        if str(found).startswith("volumes-"):
            raise ValueError(f"{where}: a store of volumes; train on it with --model sam-med3d")
        raise ValueError(
            f"{where}: slice store format {FORMAT} wanted, found {found!r:.40}; prepare it again"
        )
    classes = check_classes(index.get("classes"), where)
    if not isinstance(index.get("cases"), list):
        raise ValueError(f"{where}: no list of cases")
    files = set()
    for case in index["cases"]:
        _check_case(case, where, len(classes))
        if case["file"] in files:
            raise ValueError(f"{where}: two cases named {case['file']!r}")
        files.add(case["file"])


def check_classes(classes: object, where: str) -> list[Entry]:
    """`classes` itself if it is a class table: rows {id, name, ...} with the ids 0, 1, 2, ..."""
    if not isinstance(classes, list) or not 2 <= len(classes) <= 256:
        raise ValueError(f"{where}: a class table of 2 to 256 classes is wanted")
    for number, row in enumerate(classes):
        if not (
            isinstance(row, dict) and row.get("id") == number and isinstance(row.get("name"), str)
        ):
            raise ValueError(f"{where}: class {number} must be {{'id': {number}, 'name': ...}}")
    return classes


def _check_case(case: object, where: str, num_classes: int) -> None:
    if not isinstance(case, dict):
        raise ValueError(f"{where}: a case must be an object, found {case!r:.80}")
    for key in CASE_KEYS - case.keys():
        raise ValueError(f"{where}: a case without {key!r}")
    where = f"{where}: case {check_name(case.get('file'), f'{where}: case file')}"
    shape, names, listed = case.get("shape"), case.get("slices"), case.get("listed")
    if not isinstance(case.get("id"), str) or case.get("split") not in SPLITS:
        raise ValueError(f"{where}: a text id and a split of {'/'.join(SPLITS)} are wanted")
    if not (
        isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    ):
        raise ValueError(f"{where}: shape [S, H, W] wanted, found {shape!r:.80}")
    if not (
        isinstance(names, list) and len(names) == shape[0] and all(type(n) is str for n in names)
    ):
        raise ValueError(f"{where}: {shape[0]} slice names wanted")
    if listed is not None and not (isinstance(listed, list) and len(listed) == shape[0]):
        raise ValueError(f"{where}: {shape[0]} entries of 'listed', or null, wanted")
    spacing = case["spacing"]
    if spacing is not None and not _is_spacing(spacing):
        raise ValueError(
            f"{where}: spacing [z, y, x] in mm, or null, wanted, found {spacing!r:.80}"
        )
    pixels = case.get("pixels")
    if not isinstance(pixels, list) or len(pixels) != shape[0]:
        raise ValueError(f"{where}: pixel counts of {shape[0]} slices wanted")
    for row in pixels:
        if not (
            isinstance(row, list) and len(row) == num_classes and all(type(n) is int for n in row)
        ):
            raise ValueError(f"{where}: labels outside the {num_classes} classes of the table")


def _is_spacing(value: object) -> bool:
    numbers = isinstance(value, list) and all(type(n) in (int, float) for n in value)
    return numbers and len(value) == 3 and all(0 < n < math.inf for n in value)


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an npy file; it appears under its name only when it is complete."""
    with atomic_write(path) as scratch, scratch.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(array), allow_pickle=False)


class SliceStore:
    """A slice store opened for reading; arrays stay on disk until a slice is asked for.

    Raises FileNotFoundError where there is no index, ValueError where it is not sound. It pickles
    without its open maps, so worker processes open their own.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no slice store in {self.folder} (index.json is missing);"
                " make one with python -m dataset.prepare, or try --dataset phantom"
            )
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(
                f"{path}: larger than {MAX_INDEX_BYTES >> 20} MiB, not an index of slices"
            )
        text = path.read_bytes()
        try:
            self.index: Entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not readable as JSON ({error}); prepare it again") from None
        check_index(self.index, str(path))
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

    def slices(self, split: str) -> list[tuple[int, int]]:
        """(case number, slice) of every slice of a split that the release's CSV names, in order."""
        return [
            (number, k)
            for number, case in enumerate(self.cases)
            if case["split"] == split
            for k in range(case["shape"][0])
            if case["listed"] is None or case["listed"][k]
        ]

    def read(self, case_number: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask of one slice, uint8 (H, W) each, memory-mapped and read-only.

        Raises FileNotFoundError or ValueError, naming the file, for arrays that are not what the
        index says or hold labels outside the class table.
        """
        image, mask = self._open(case_number)
        case, label = self.cases[case_number], mask[k].max()
        if label >= len(self.index["classes"]):
            where = f"{self.folder}: case {case['file']}, slice {case['slices'][k]}"
            raise ValueError(
                f"{where}: label {label} is outside the table of {len(self.classes)} classes"
            )
        return image[k], mask[k]

    def _open(self, case_number: int) -> tuple[np.ndarray, np.ndarray]:
        if case_number in self._maps:
            self._maps.move_to_end(case_number)
            return still_whole(self._maps[case_number])
        case = self.cases[case_number]
        stem, shape = self.folder / "cases" / case["file"], tuple(case["shape"])
        arrays = tuple(map_array(Path(f"{stem}.{name}.npy"), shape) for name in ("image", "mask"))
        self._maps[case_number] = arrays
        if len(self._maps) > MAX_OPEN_CASES:
            self._maps.popitem(last=False)
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}


def map_array(path: Path, shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    """The array of an npy file, memory-mapped and read-only, once its header is what is wanted.

    Raises FileNotFoundError or ValueError naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is named by the index but missing; prepare the store again"
        )
    with path.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    try:
        found, fortran, stored, offset = npy_header(head)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if found != shape or fortran or stored != np.dtype(dtype):
        raise ValueError(f"{path}: {dtype} {shape} wanted, found {stored!s:.40} {found!s:.80}")
    size = offset + math.prod(shape) * stored.itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path}: {size} bytes wanted, found {path.stat().st_size}")
    # As a plain array over the same map: a memmap runs Python code at every view taken of it.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def still_whole(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Arrays of `map_array`, as they are; raises ValueError where a file was cut since then.

    Reading from a map beyond the end of its file would end the process without a word (SIGBUS).
    """
    for array in arrays:
        stored = array.base
        if os.stat(stored.filename).st_size < stored.offset + array.nbytes:
            raise ValueError(f"{stored.filename}: became shorter while it was in use")
    return arrays
