"""What slice and volume stores share: a folder of memory-mapped arrays with one index."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import (
    SCRATCH,
    array_digest,
    atomic_write,
    file_digest,
    rebuilt,
    sweep,
    write_text,
)

SPLITS = ("train", "val", "test")
KINDS = ("image", "mask")  # of a case's arrays
MAX_OPEN_CASES = 512  # two maps each; far below Linux's 65,530 maps a process
MAX_INDEX_BYTES = 256 << 20  # 33,000 slices of 17 classes take about 5 MB
STORE_FILE = re.compile(r"(index|splits)\.json|cases/.*\.(json|(image|mask)\.npy)")
HEADER_BYTES = 4096  # an npy header of a plain array is 118 bytes long

Entry = dict[str, Any]


class Store:
    """A store opened for reading; arrays stay on disk until their values are asked for.

    Raises FileNotFoundError where there is no index, ValueError where it is not sound. It pickles
    without its open maps, so worker processes open their own.
    """

    what = "store"
    hint = "make one with python -m dataset.prepare"

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no {self.what} in {self.folder} (index.json is missing); {self.hint}"
            )
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_INDEX_BYTES >> 20} MiB, not an index")
        text = path.read_bytes()
        try:
            self.index: Entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not readable as JSON ({error}); prepare it again") from None
        self.check(self.index, str(path))
        self.digest = hashlib.sha256(text).hexdigest()
        self._stamp = _stamp(path)
        self._maps: OrderedDict[int, tuple[np.ndarray, ...]] = OrderedDict()

    @staticmethod
    def check(index: object, where: str) -> None:
        """Raises ValueError, naming `where` and the case, unless the index is valid."""
        raise NotImplementedError

    @property
    def cases(self) -> list[Entry]:
        """Entries of the index, sorted by file name; a case number is an index of this list."""
        return self.index["cases"]

    @property
    def classes(self) -> list[str]:
        """Class names by label id; the first is the background."""
        return [row["name"] for row in self.index["classes"]]

    def arrays(self, case_number: int) -> tuple[np.ndarray, ...]:
        """Image and mask of a case, memory-mapped and read-only.

        Raises FileNotFoundError or ValueError, naming the file, for other arrays than the index's.
        """
        if case_number in self._maps:
            self._maps.move_to_end(case_number)
            return still_whole(self._maps[case_number])
        case = self.cases[case_number]
        stem, shape = self.folder / "cases" / case["file"], tuple(case["shape"])
        dtypes = case.get("dtype", "uint8"), "uint8"
        arrays = tuple(
            map_array(Path(f"{stem}.{kind}.npy"), shape, dtype)
            for kind, dtype in zip(KINDS, dtypes, strict=True)
        )
        self._check_unchanged()
        self._maps[case_number] = arrays
        if len(self._maps) > MAX_OPEN_CASES:
            self._maps.popitem(last=False)
        return arrays

    def shown(self, case_number: int) -> set[int]:
        """The foreground classes in a case; for a volume, those of its objects."""
        return shown(self.cases[case_number])

    def _check_unchanged(self) -> None:
        """Raises ValueError if the store was replaced since it was opened."""
        path = self.folder / "index.json"
        if _stamp(path) != self._stamp and file_digest(path) != self.digest:
            raise ValueError(f"{self.folder}: the store was replaced while in use; start again")

    def case_digests(self, numbers: Iterable[int]) -> dict[str, str]:
        """Digest of the images' content by case id; read from the arrays in older stores."""
        found: dict[str, str] = {}
        for number in sorted(set(numbers)):
            case = self.cases[number]
            digest = (case.get("digests") or {}).get("image")
            digest = digest or array_digest(self.arrays(number)[0])
            if case["id"] in found:  # a case of slices of several sizes
                digest = hashlib.sha256(f"{found[case['id']]} {digest}".encode()).hexdigest()
            found[case["id"]] = digest
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def write_arrays(folder: Path | str, entry: Entry, image: np.ndarray, mask: np.ndarray) -> Entry:
    """{"shape", "digests"} of a case whose arrays were written below `folder`/cases.

    Each array appears under its name only when it is complete. Raises ValueError for a file name
    with folders in it.
    """
    folder = Path(folder)
    file = check_name(entry.get("file"), f"{folder}: case file")
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    digests = {}
    for kind, array in zip(KINDS, (image, mask), strict=True):
        path = folder / "cases" / f"{file}.{kind}.npy"
        with atomic_write(path) as scratch, scratch.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
        digests[kind] = array_digest(array)
    return {"shape": list(image.shape), "digests": digests}


def write_checked_index(folder: Path | str, index: Entry, store: type[Store]) -> Path:
    """Writes a store's index, last and atomically: a store with an index is complete.

    Returns its path. Cases are sorted by file name; what is written is checked as on reading.
    Raises ValueError.
    """
    path = Path(folder) / "index.json"
    index = {**index, "cases": sorted(index["cases"], key=lambda case: case["file"])}
    store.check(index, str(path))
    check_class_names([row["name"] for row in index["classes"]], str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(index, sort_keys=True, separators=(",", ":"), allow_nan=False))
    return path


@contextlib.contextmanager
def new_store(
    folder: Path | str, purpose: str, *, overwrite: bool = False, keep: bool = False,
    wait: bool = False,
) -> Iterator[Path]:  # fmt: skip
    """Context manager: a folder for a new store; replaces `folder` at the end, see files.rebuilt.

    Hidden files of others stay in `folder`. Raises ValueError where it holds others than a store's;
    overwrite: unless they have a store's names, and are replaced.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; choose another --output")
    others = foreign(folder)
    for path in others:
        replaceable = STORE_FILE.fullmatch(path.relative_to(folder).as_posix()) and path.is_file()
        if not path.name.startswith(".") and not (overwrite and replaceable):
            advice = " or pass --overwrite" if replaceable else ""
            raise ValueError(
                f"{folder}: {path.relative_to(folder)} was not written by this program; choose"
                f" another folder{advice}"
            )
    with rebuilt(folder, purpose, keep=keep, wait=wait) as new:
        for place in (new, new / "cases"):
            sweep(place)
        yield new
        hidden = [path for path in others if path.name.startswith(".")]
        for path in hidden if (new / "index.json").is_file() else ():
            target = new / path.relative_to(folder)
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, target, symlinks=True, dirs_exist_ok=True)
            elif not os.path.lexists(target):
                link_file(path, target)


def foreign(folder: Path) -> list[Path]:
    """Files in a store's folder, or in its cases, that are not part of a store; sorted."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        files = {str(case["file"]) for case in index["cases"]}
        ours = {"cases", "splits.json", "index.json"}
    except FileNotFoundError:
        files, ours = set(), {"cases", "splits.json"}
    except (ValueError, KeyError, TypeError, OSError):
        files, ours = set(), {"cases"}
    found = [path for path in folder.glob("*") if path.name not in ours]
    for path in (folder / "cases").glob("*"):
        stem = re.sub(r"\.(json|(image|mask)\.npy)$", "", path.name)
        if stem not in files and not path.with_name(f"{stem}.json").is_file():
            found.append(path)
    return sorted(path for path in found if not path.name.startswith(SCRATCH))


def link_file(source: Path | str, target: Path | str) -> None:
    """Hard-links a file, or copies it where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def shown(case: Entry) -> set[int]:
    """The foreground classes in a case; for a volume, those of its objects."""
    if "objects" in case:
        return set(case["objects"])
    return set((np.flatnonzero(np.sum(case["pixels"], axis=0)[1:]) + 1).tolist())


def check_name(name: object, where: str) -> str:
    """`name` itself if it is one plain file name; raises ValueError naming `where` otherwise.

    Absolute names, folders, `..`, a leading dot, NUL and over 200 characters are refused.
    """
    plain = isinstance(name, str) and 0 < len(name) <= 200 and not name.startswith(".")
    if not plain or any(c in name for c in "/\\:\0"):
        raise ValueError(f"{where}: {name!r:.80} is not a plain file name (no folders, no '..')")
    return name


def check_table(index: Entry, where: str, keys: set[str]) -> int:
    """Number of classes of an index, after checking its class table and list of cases.

    keys: what each case must have. Raises ValueError, naming `where` and the case.
    """
    classes, cases = index.get("classes"), index.get("cases")
    if not isinstance(classes, list) or not 2 <= len(classes) <= 256:
        raise ValueError(f"{where}: expected a class table of 2 to 256 classes")
    for number, row in enumerate(classes):
        known = isinstance(row, dict) and row.get("id") == number
        if not known or not isinstance(row.get("name"), str):
            raise ValueError(f"{where}: class {number} must be {{'id': {number}, 'name': ...}}")
    if not isinstance(cases, list):
        raise ValueError(f"{where}: no list of cases")
    for case in cases:
        if not isinstance(case, dict):
            raise ValueError(f"{where}: a case must be an object, found {case!r:.80}")
        if missing := keys - case.keys():
            raise ValueError(f"{where}: a case without {min(missing)!r}")
        name = check_name(case["file"], f"{where}: case file")
        if not isinstance(case["id"], str) or case["split"] not in SPLITS:
            raise ValueError(
                f"{where}: case {name}: expected a text id and a split of {'/'.join(SPLITS)}"
            )
    twice = [name for name, count in Counter(case["file"] for case in cases).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: two cases named {twice[0]!r}")
    return len(classes)


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError for class names that are empty, duplicate, or a second background.

    names: by label id, the background's first. Control characters are refused as well.
    """
    for number, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"{where}: class {number} has an empty name; name it")
        if not name.isprintable():
            raise ValueError(f"{where}: class {number}: control characters in {name!r:.80}")
        if number and name.strip().lower() == "background":
            raise ValueError(
                f"{where}: class {number} is named {name!r} as label 0 is; choose another name"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: two classes named {twice[0]!r}; give each its own name")


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


def map_array(path: Path, shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    """The array of an npy file, memory-mapped and read-only, once its header is as expected.

    Raises FileNotFoundError or ValueError naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is in the index but missing; prepare the store again")
    with path.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    try:
        found, fortran, stored, offset = npy_header(head)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if found != shape or fortran or stored != np.dtype(dtype):
        raise ValueError(f"{path}: expected {dtype} {shape}, found {stored!s:.40} {found!s:.80}")
    size = offset + math.prod(shape) * stored.itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path}: expected {size} bytes, found {path.stat().st_size}")
    # As a plain array over the same map: a memmap runs Python code at every view taken of it.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def still_whole(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Returns arrays of `map_array`; raises ValueError if a file became shorter since then.

    Reading from a map beyond the end of its file would end the process without a word (SIGBUS).
    """
    for array in arrays:
        stored = array.base
        if os.stat(stored.filename).st_size < stored.offset + array.nbytes:
            raise ValueError(f"{stored.filename}: became shorter while it was in use")
    return arrays


def packed_places(roots: Sequence[Path], digest: str) -> list[Path]:
    """Possible folders of a packed store of this digest: `packed` in the only root, the cache."""
    beside = [roots[0] / "packed"] if len(roots) == 1 else []
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [*beside, cache / "u-sam" / digest[:16]]


def packed_place(roots: Sequence[Path], digest: str) -> Path:
    """The folder to pack into, in the user's cache where the only root is read-only."""
    places = packed_places(roots, digest)
    # A folder without any write bit is meant to stay as it is, even for root.
    writable = os.access(roots[0], os.W_OK) and roots[0].stat().st_mode & 0o222
    return places[0] if writable else places[-1]
