"""Labelled scans become a volume store: resampled, oriented, small structures told apart.

`python -m dataset.prepare volumes` calls prepare_volumes; `--dataset volumes` on SAM-Med3D's own
layout packs it here on first use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import write_json
from dataset.parallel import default_workers
from dataset.prepare.folder import check_names, check_output, pack_all, sweep
from dataset.prepare.packing import NPY_HEADER, file_blocks, plain_name
from dataset.prepare.sources import CaseFiles, Source, class_table
from dataset.prepare.volume_sources import LAYOUT, class_of, find_volumes, is_layout, patient_of
from dataset.scans.header import Scan
from dataset.scans.orientation import geometry_difference
from dataset.scans.read import read_label
from dataset.scans.volumes import Grid, ScanVolume, read_volume, resample_label
from dataset.splits import held_out
from dataset.store.folder import Entry, packed_place, packed_places
from dataset.store.volumes import VolumeStore, case_bytes, write_volume, write_volume_index

PACKING = 2  # raise it when packing changes: cases packed by older rules are then packed again
MIN_VOLUME = 1.0  # cm3


@dataclass(frozen=True)
class VolumeJob:
    """A case to pack; binary gives the label's one class id in SAM-Med3D's layout."""

    case: CaseFiles
    output: Path
    names: tuple[str, ...]  # of the classes, for what is said about them; may be empty
    binary: int | None = None
    min_volume: float = MIN_VOLUME
    ignore_label_affine: bool = False

    @property
    def file(self) -> str:
        """Stem of the case's files below cases/: its id in plain characters."""
        return plain_name(self.case.id)


def open_store(data_root: Path | str | Sequence[Path | str]) -> VolumeStore:
    """A prepared store, or SAM-Med3D's layout packed on first use.

    data_root: the store, or one or more roots of the layout. Packed volumes lie in the only
    root's folder `packed`, or in the user's cache; they are packed again when a file changes.
    Raises FileNotFoundError for any other folder.
    """
    single = isinstance(data_root, (str, Path))
    roots = [Path(data_root)] if single else [Path(root) for root in data_root]
    if len(roots) == 1 and ((roots[0] / "index.json").is_file() or not is_layout(roots[0])):
        return VolumeStore(roots[0])
    source = find_volumes(roots)
    digest = _listing_digest(source)
    for place in packed_places(roots, digest):
        try:
            store = VolumeStore(place)
        except (FileNotFoundError, ValueError):  # none yet, or of another version
            continue
        if store.index.get("listing") == digest:
            return store
    place = packed_place(roots, digest)
    workers = min(default_workers(), len(source.cases) // 8)  # few are packed right here
    prepare_volumes(source, place, workers=workers, listing=digest)
    return VolumeStore(place)


def prepare_volumes(
    source: Source,
    output: Path,
    *,
    min_volume: float = MIN_VOLUME,
    ignore_label_affine: bool = False,
    test_fraction: float = 0.0,
    seed: int = 202307,
    workers: int = 1,
    listing: str | None = None,
) -> Entry:
    """Index of the volume store made of a source's cases.

    min_volume in cm3: smaller structures stay in the masks but are no objects. Cases packed
    before from the same files with the same options are kept. Raises ValueError, one line a
    fault, if a case cannot be packed, or if no object is left; there is no index then.
    """
    source = _with_test_patients(source, test_fraction, seed)
    check_output(output)
    jobs = _jobs(source, output, min_volume, ignore_label_affine)
    check_names(jobs)
    sweep(output)
    entries = pack_all(pack_volume, jobs, workers)
    if not any(entry["objects"] for entry in entries):
        raise ValueError(
            f"no structure of {min_volume:g} cm3 or more in {len(entries)} cases; lower"
            " --min_volume or check the labels"
        )
    digest = hashlib.sha256("".join(entry["source"] for entry in entries).encode())
    index = {
        "dataset": source.name,
        "classes": source.classes or _unnamed_classes(entries),
        "min_volume": min_volume,
        "source": digest.hexdigest(),
        "listing": listing,
        "cases": entries,
    }
    write_volume_index(output, index)
    return VolumeStore(output).index


def pack_volume(job: VolumeJob) -> Entry:
    """The case's index entry, with arrays and record written unless they are there already.

    Raises ValueError or FileNotFoundError naming the file: a scan or label that cannot be read, a
    label that is not binary in SAM-Med3D's layout, image and label in different places.
    """
    record, key = job.output / "cases" / f"{job.file}.json", _key(job)
    entry = _recorded(record, key)
    if entry is not None:
        return entry
    scan = read_volume(job.case.image, job.case.channel, job.case.series)
    label = _read_label(job, scan)
    mask = resample_label(label.array, Grid(label.header))
    objects, dropped = _sorted_out(job, label, mask)
    entry = {
        "id": job.case.id,
        "patient": patient_of(job.case.id),
        "split": job.case.split,
        "file": job.file,
        "affine": scan.affine.tolist(),
        "native": {"shape": list(label.array.shape), "spacing": list(label.spacing)},
        "dropped": dropped,
        "source": key,
    }
    if scan.grid.header.remarks:
        entry["remarks"] = list(scan.grid.header.remarks)
    entry = write_volume(job.output, entry, scan.image, mask, objects=objects)
    write_json(record, {"key": key, "entry": entry}, indent=None)
    return entry


def _read_label(job: VolumeJob, scan: ScanVolume) -> Scan:
    """The label in class ids, as stored, on the image's header if that is to be trusted."""
    label = read_label(job.case.label)
    if job.binary is not None:
        if label.array.max() > 1:
            found = ", ".join(map(str, np.unique(label.array)[:5]))
            raise ValueError(
                f"{job.case.label}: {LAYOUT} wants binary labels (0 and 1), found {found};"
                " prepare multi-class labels from folders images and labels"
            )
        label = Scan(label.array * np.uint8(job.binary), label.header)
    elif job.names and label.array.max() >= len(job.names):
        raise ValueError(
            f"{job.case.label}: label {label.array.max()} is outside the table of"
            f" {len(job.names)} classes"
        )
    if job.ignore_label_affine:
        if label.array.shape != scan.grid.header.shape:
            raise ValueError(
                f"{job.case.label}: shape {label.array.shape} is not the image's"
                f" {scan.grid.header.shape}"
            )
        return Scan(label.array, scan.grid.header)
    difference = geometry_difference(scan.grid.header, label.header)
    if difference:
        raise ValueError(
            f"{job.case.label}: does not lie on {job.case.image.name}: {difference};"
            " --ignore_label_affine trusts the order of the voxels"
        )
    return label


def _sorted_out(job: VolumeJob, label: Scan, mask: np.ndarray) -> tuple[list[int], list[str]]:
    """Ids of the label's objects, and a line for each structure that is none."""
    voxel = abs(np.linalg.det(label.affine[:3, :3])) / 1000  # cm3
    before, after = (
        np.bincount(array.ravel(order="K"), minlength=256) for array in (label.array, mask)
    )
    objects, dropped = [], []
    for number in np.flatnonzero(before[1:]) + 1:
        name = job.names[number] if job.names else f"class {number}"
        volume = before[number] * voxel
        if volume < job.min_volume:
            dropped.append(f"{job.case.id}: {name}: {volume:.3g} cm3, below {job.min_volume:g}")
        elif not after[number]:
            dropped.append(f"{job.case.id}: {name}: no voxel left at 1.5 mm")
        else:
            objects.append(int(number))
    if not objects and not dropped:
        dropped.append(f"{job.case.id}: the label is empty")
    return objects, dropped


def _with_test_patients(source: Source, fraction: float, seed: int) -> Source:
    if not fraction:
        return source
    if any(case.split == "test" for case in source.cases):
        raise ValueError(f"{source.name}: has test cases of its own; leave out --test_fraction")
    training = {patient_of(case.id) for case in source.cases if case.split == "train"}
    testing = held_out(training, fraction, seed)
    cases = [
        replace(case, split="test") if patient_of(case.id) in testing else case
        for case in source.cases
    ]
    return replace(source, cases=cases)


def _jobs(source: Source, output: Path, min_volume: float, trusted: bool) -> list[VolumeJob]:
    names = tuple(row["name"] for row in source.classes or ())
    return [
        VolumeJob(
            case,
            output,
            names=names,
            binary=1 + names[1:].index(class_of(case.id)) if source.name == "layout" else None,
            min_volume=min_volume,
            ignore_label_affine=trusted,
        )
        for case in source.cases
    ]


def _unnamed_classes(entries: list[Entry]) -> list[Entry]:
    highest = max(int(number) for entry in entries for number in entry["boxes"])
    return class_table([f"class {number}" for number in range(1, highest + 1)])


def _listing_digest(source: Source) -> str:
    """Hex digest of the names, sizes and times of a source's files."""
    digest = hashlib.sha256(f"volumes {PACKING}".encode())
    for case in source.cases:
        for path in (case.image, case.label):
            stat = path.stat()
            line = f"{case.id}\0{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _key(job: VolumeJob) -> str:
    """Hex digest of all that decides a case's bytes: its two sources and the options."""
    case = job.case
    settings: list[Any] = [PACKING, case.id, case.split, case.channel, job.names, job.binary]
    settings += [job.min_volume, job.ignore_label_affine]
    settings += [] if case.series is None else [case.series]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in (case.image, case.label):
        for block in file_blocks(path):
            digest.update(block)
    return digest.hexdigest()


def _recorded(record: Path, key: str) -> Entry | None:
    """The entry of a case packed before from the same bytes, if its arrays are there in full."""
    try:
        held = json.loads(record.read_bytes())
        entry = held["entry"]
        whole = all(
            record.with_name(f"{record.stem}.{name}.npy").stat().st_size == NPY_HEADER + size
            for name, size in zip(("image", "mask"), case_bytes(entry), strict=True)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if whole and held.get("key") == key else None
