"""One raw scan and its label become one case of the slice store, and a record that it is done.

`prepare` runs pack_case in its workers; a case whose record fits is never packed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import write_json
from dataset.prepare.sources import CaseFiles
from dataset.scans.find import files_of
from dataset.scans.header import Scan
from dataset.scans.in_plane import body_box, crop, resample_in_plane
from dataset.scans.orientation import geometry_difference, to_canonical
from dataset.scans.read import read_header, read_label, read_scan
from dataset.scans.window import Window, apply_window, window_limits
from dataset.store import slices
from dataset.store.folder import Entry

PACKING = 1  # raise it when packing changes: cases packed by older rules are then packed again
HASH_BYTES = 2**20
NPY_HEADER = 128  # bytes np.save writes before the data of a plain array


@dataclass(frozen=True)
class Options:
    """What shapes the bytes of a case; spacing in mm, None for the native in-plane size."""

    window: Window
    spacing: float | None = None
    body_crop: bool = False
    num_classes: int | None = None
    ignore_label_affine: bool = False


@dataclass(frozen=True)
class Job:
    """A case to pack, where to, and how."""

    case: CaseFiles
    output: Path
    options: Options

    @property
    def file(self) -> str:
        """Stem of the case's files below cases/: its id in plain characters."""
        return plain_name(self.case.id)


def plain_name(text: str) -> str:
    """The text with runs of all but letters, digits, dots and dashes as one underscore."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).lstrip(".") or "case"


def pack_case(job: Job) -> Entry:
    """The case's index entry, with arrays and record written unless they are there already.

    Holds one volume at a time. Raises ValueError or FileNotFoundError naming the file: a scan or
    label that cannot be read, labels outside the table, image and label in different places.
    """
    record = job.output / "cases" / f"{job.file}.json"
    key = _key(job)
    entry = _recorded(record, key)
    if entry is not None:
        return entry
    if not job.options.ignore_label_affine:
        case = job.case
        difference = geometry_difference(
            read_header(case.image, case.series), read_header(case.label)
        )
        if difference:
            raise ValueError(
                f"{case.label}: does not lie on {case.image.name}: {difference};"
                " --ignore_label_affine trusts the order of the voxels"
            )
    image, facts, scan = _pack_image(job)
    mask = _pack_label(job, scan, facts["box"])
    entry = {
        "id": job.case.id,
        "split": job.case.split,
        "file": job.file,
        "slices": [f"{job.case.id}_slice{k}" for k in range(len(image))],
        "source": key,
        **facts,
    }
    entry = slices.write_case(job.output, entry, image, mask)
    write_json(record, {"key": key, "entry": entry}, indent=None)
    return entry


def _pack_image(job: Job) -> tuple[np.ndarray, dict[str, Any], Scan]:
    """uint8 slices, what the index keeps of them, and the scan's header with an empty array."""
    options = job.options
    scan = read_scan(job.case.image, job.case.channel, job.case.series)
    volume = to_canonical(scan)
    limits = window_limits(volume.slices, options.window)
    box = body_box(volume.slices, options.window) if options.body_crop else None
    facts = {
        "range": [float(volume.slices.min()), float(volume.slices.max())],
        "limits": list(limits),
        "native": list(volume.slices.shape),
        "box": list(box) if box else None,
    }
    if box:
        volume = crop(volume, box)
    volume = replace(volume, slices=apply_window(volume.slices, limits))
    if options.spacing:
        volume = resample_in_plane(volume, options.spacing)
    if volume.spacing is not None:
        facts |= {"spacing": list(volume.spacing), "affine": volume.affine.tolist()}
    if scan.header.remarks:
        facts["remarks"] = list(scan.header.remarks)
    return volume.slices, facts, Scan(np.empty(0), scan.header)


def _pack_label(job: Job, scan: Scan, box: Sequence[int] | None) -> np.ndarray:
    label = read_label(job.case.label, job.options.num_classes)
    if job.options.ignore_label_affine:
        if label.array.shape != scan.header.shape:
            raise ValueError(
                f"{job.case.label}: shape {label.array.shape} is not the image's"
                f" {scan.header.shape}"
            )
        label = Scan(label.array, scan.header)
    volume = to_canonical(label)
    if box:
        volume = crop(volume, tuple(box))
    if job.options.spacing:
        volume = resample_in_plane(volume, job.options.spacing, labels=True)
    return volume.slices


def _key(job: Job) -> str:
    """Hex digest of all that decides a case's bytes: its two sources and the options."""
    case = job.case
    settings = {**asdict(job.options), "split": case.split, "id": case.id, "channel": case.channel}
    if case.series is not None:
        settings["series"] = case.series
    digest = hashlib.sha256(f"{PACKING} {json.dumps(settings, sort_keys=True)}".encode())
    for path in (case.image, case.label):
        for block in file_blocks(path):
            digest.update(block)
    return digest.hexdigest()


def file_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of all files of a scan, with their sizes between."""
    for file in files_of(path):
        yield f"\0{file.stat().st_size}\0".encode()
        with file.open("rb") as stream:
            while block := stream.read(HASH_BYTES):
                yield block


def _recorded(record: Path, key: str) -> Entry | None:
    """The entry of a case packed before from the same bytes, if its arrays are there in full."""
    try:
        held = json.loads(record.read_bytes())
        entry = held["entry"]
        size = NPY_HEADER + math.prod(entry["shape"])
        arrays = [record.with_name(f"{record.stem}.{name}.npy") for name in ("image", "mask")]
        whole = all(array.stat().st_size == size for array in arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if whole and held.get("key") == key else None
