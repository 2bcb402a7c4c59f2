"""The CARE release (rectum and rectal tumour in CT), packed once into a slice store.

`build_dataset` opens it for `--dataset rectum`; `dataset.verify` reads its files one by one.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dataset.labels import from_care
from dataset.store import slices
from dataset.store.folder import (
    HEADER_BYTES,
    Entry,
    check_name,
    new_store,
    npy_header,
    packed_place,
    packed_places,
)
from dataset.store.slices import SliceStore

PACKING = 1  # raise it when packing changes: stores packed by older rules are then made again
MAX_SIDE = 4096  # pixels; the release has 224 and 512
MAX_CSV_BYTES = 64 << 20
THREADS = min(8, os.cpu_count() or 1)  # unpacking leaves Python's lock
CLASSES = (("background", "#000000"), ("normal rectum", "#2ca02c"), ("tumour", "#d62728"))
LAYOUT = "train/train_npz/NAME.npz, train/train_bbox.csv, test/test_npz/..., test/test_bbox.csv"

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
FOUR_NUMBERS = re.compile(rf"[\[(]?\s*{NUMBER}(?:\s*,\s*{NUMBER}|\s+{NUMBER}){{3}}\s*,?\s*[\])]?")
SLICE_NAME = re.compile(r"(case\d+)_slice(\d+)")


class Split(NamedTuple):
    """One split of the release as its folder lists it."""

    name: str
    files: list[Path]
    boxes: dict[str, tuple[float, ...]]  # the slices the CSV names


def open_store(data_root: Path | str) -> SliceStore:
    """The packed CARE release under `data_root`; packs it, with a progress bar, when it is new.

    The store lies in `data_root`/packed, or in the user's cache where `data_root` is read-only. It
    is made again when a slice or a CSV changes. Of several processes one packs and the
    others wait. Raises FileNotFoundError for a missing release and
    ValueError, naming file and reason, for files that are not the release's.
    """
    root = Path(data_root)
    splits = find_splits(root)
    digest = source_digest(root, splits)
    for place in packed_places([root], digest):
        if holds(place, digest):
            return SliceStore(place)
    place = packed_place([root], digest)
    with new_store(place, "packing CARE", overwrite=True, wait=True) as new:
        if not holds(place, digest):  # another process may have packed it meanwhile
            pack(splits, new, digest)
    return SliceStore(place)


def find_splits(root: Path) -> list[Split]:
    """The splits found below `root`, train before test, files sorted by name.

    Raises FileNotFoundError where there is none or a CSV (or a slice it names) is missing.
    """
    splits = []
    for name in ("train", "test"):
        folder, table = root / name / f"{name}_npz", root / name / f"{name}_bbox.csv"
        files = sorted(folder.glob("*.npz"))
        if not files and not table.is_file():
            continue
        if not table.is_file():
            raise FileNotFoundError(f"rectum: {table} is missing; expected {LAYOUT}")
        boxes = read_boxes(table)
        present = {file.stem for file in files}
        for missing in sorted(boxes.keys() - present):
            raise FileNotFoundError(
                f"rectum: {table} names {missing!r}, but {folder} has no such npz"
            )
        splits.append(Split(name, files, boxes))
    if not any(split.files for split in splits):
        raise FileNotFoundError(
            f"rectum: no slices under {root}; expected {LAYOUT}: pass --data_root,"
            " or try --dataset phantom, which needs no data"
        )
    return splits


def read_boxes(table: Path) -> dict[str, tuple[float, ...]]:
    """Slice name -> the four numbers of its box, as a CSV of the release lists them.

    A first row without four numbers is a header. Names may end in .npz. Nothing is evaluated.
    Raises ValueError, naming file and line, for any other row.
    """
    if table.stat().st_size > MAX_CSV_BYTES:
        raise ValueError(f"{table}: larger than {MAX_CSV_BYTES >> 20} MiB, not a list of slices")
    boxes: dict[str, tuple[float, ...]] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            for row in (reader := csv.reader(stream)):
                where, cell = f"{table}, line {reader.line_num}", ",".join(row[1:]).strip()
                if not row or FOUR_NUMBERS.fullmatch(cell) is None:
                    if reader.line_num == 1 or not any(row):
                        continue
                    raise ValueError(f'{where}: expected NAME,"[x, y, x, y]", found {row!r:.120}')
                box = tuple(float(number) for number in re.findall(NUMBER, cell))
                if not all(map(math.isfinite, box)):
                    raise ValueError(f"{where}: box {box} is not finite")
                boxes[_slice_name(row[0], where)] = box
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: not a readable CSV ({error})") from None
    return boxes


def _slice_name(text: str, where: str) -> str:
    name = text.strip()
    outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or "\0" in name
    if outside or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"{where}: {text!r:.120} points outside the release; use plain names")
    return check_name(name.removesuffix(".npz"), where)


def case_of(name: str) -> tuple[str, int]:
    """(case, slice number): `caseN_sliceM` belongs to case N, any other name is its own case."""
    match = SLICE_NAME.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


def source_digest(root: Path, splits: list[Split]) -> str:
    """Hex digest of what was packed: names, sizes and times of the slices, and the CSVs."""
    digest = hashlib.sha256(f"care {PACKING}".encode())
    for split in splits:
        for file in split.files:
            stat = file.stat()
            line = f"{file.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update((root / split.name / f"{split.name}_bbox.csv").read_bytes())
    return digest.hexdigest()


def read_slice(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of one npz of the release, uint8 (H, W), transposed as stored.

    The image is clipped to [0, 1], then scaled to 0..255 and truncated; label 3 (also tumour)
    becomes 2. Raises ValueError, naming the file, for anything else than the release's content.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            image, label = (_read_array(archive, key) for key in ("image", "label"))
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path}: not a readable npz ({error!s:.200})") from None
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from None
    if image.shape != label.shape:
        raise ValueError(f"{path}: image {image.shape} and label {label.shape} differ in shape")
    if image.dtype.kind != "f" or not np.isfinite(image).all():
        raise ValueError(f"{path}: the image must hold finite floats about [0, 1] ({image.dtype})")
    pixels = (np.clip(image.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    return pixels, from_care(label, path)


def _read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """A 2-D array of an npz; no more is unpacked than its checked header asks for."""
    name = f"{key}.npy"
    if name not in archive.namelist():
        held = ", ".join(archive.namelist()[:5]) or "nothing"
        raise ValueError(f"no array {key!r}; expected image and label, found {held:.200}")
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is compressed in a way numpy never writes")
    with archive.open(name) as stream:
        head = stream.read(HEADER_BYTES)
        shape, fortran, dtype, offset = npy_header(head)
        if len(shape) != 2 or not all(0 < side <= MAX_SIDE for side in shape):
            raise ValueError(f"{key} is {shape}; expected a slice of up to {MAX_SIDE} x {MAX_SIDE}")
        if dtype.kind not in "biuf" or dtype.itemsize > 16:
            raise ValueError(f"{key} holds {dtype}, not numbers")
        size = math.prod(shape) * dtype.itemsize
        data = head[offset:] + stream.read(max(0, size - (len(head) - offset)))
        if len(data) != size or stream.read(1):
            raise ValueError(
                f"{key} holds {len(data)} bytes or more, expected {size}: cut or damaged"
            )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def pack(splits: list[Split], folder: Path, digest: str) -> None:
    """Writes the release as a slice store to `folder`; one case in memory."""
    cases = []
    total = sum(len(split.files) for split in splits)
    with (
        tqdm(total=total, desc="packing CARE", unit="slice") as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for split in splits:
            for case, files in _by_case(split.files).items():
                arrays = list(pool.map(read_slice, files))
                cases += _write(folder, split, case, list(zip(files, arrays, strict=True)))
                bar.update(len(files))
    index = {
        "dataset": "care",
        "classes": [{"id": i, "name": n, "color": c} for i, (n, c) in enumerate(CLASSES)],
        "window": None,
        "orientation": "stored",
        "clahe": True,
        "source": digest,
        "cases": cases,
    }
    slices.write_index(folder, index)


def holds(folder: Path, digest: str) -> bool:
    """Whether a folder has the store that was packed from sources of this digest."""
    try:
        return SliceStore(folder).index.get("source") == digest
    except (ValueError, OSError):  # none yet, or half of another version's store
        return False


def _by_case(files: list[Path]) -> dict[str, list[Path]]:
    cases: dict[str, list[Path]] = {}
    for file in sorted(files, key=lambda file: (case_of(file.stem), file.stem)):
        cases.setdefault(case_of(file.stem)[0], []).append(file)
    return cases


def _write(folder: Path, split: Split, case: str, read: list) -> list[Entry]:
    """Index entries of a case's slices, one for each size they come in."""
    sizes: dict[tuple[int, int], list] = {}
    for file, arrays in read:
        sizes.setdefault(arrays[0].shape, []).append((file.stem, *arrays))
    entries = []
    for number, (size, rows) in enumerate(sizes.items()):
        names, images, masks = zip(*rows, strict=True)
        entry = {
            "id": case,
            "split": split.name,
            "file": f"{split.name}_{case}" + (f"_{size[0]}x{size[1]}" if number else ""),
            "slices": list(names),
            "listed": [name in split.boxes for name in names],
        }
        entries.append(slices.write_case(folder, entry, np.stack(images), np.stack(masks)))
    return entries
