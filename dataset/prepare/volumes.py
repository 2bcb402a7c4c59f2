"""Builds a volume store from labelled scans: resampled, oriented, small structures excluded.

`--dataset volumes` on SAM-Med3D's own layout packs it here on first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataset.labels import check_label_ids
from dataset.parallel import default_workers
from dataset.prepare.cases import (
    Job,
    check_jobs,
    classes_or_numbers,
    finish_case,
    finished_case,
    keep_only,
    label_on,
    pack_all,
    sources_digest,
    with_test_cases,
)
from dataset.prepare.sources import Source
from dataset.prepare.volume_sources import LAYOUT, class_of, find_volumes, is_layout, patient_of
from dataset.scans.header import Scan, ScanHeader
from dataset.scans.volumes import Grid, read_volume, resample_label
from dataset.store.folder import Entry, new_store, packed_place, packed_places
from dataset.store.volumes import VolumeStore, write_volume, write_volume_index
from dataset.text import counted

MIN_VOLUME = 1.0  # cm3


@dataclass(frozen=True)
class VolumeOptions:
    """Options that decide a case's bytes; binary: the label's class id in SAM-Med3D's layout.

    names: of the classes, empty where nothing names them; min_volume in cm3.
    """

    names: tuple[str, ...] = ()
    binary: int | None = None
    min_volume: float = MIN_VOLUME
    ignore_label_affine: bool = False
    packing: int = 3  # raise it when packing changes: earlier cases are then packed again


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
    prepare_volumes(
        source, place, VolumeOptions(), workers=workers, listing=digest, overwrite=True, wait=True
    )
    return VolumeStore(place)


def prepare_volumes(
    source: Source,
    output: Path,
    options: VolumeOptions,
    *,
    test_fraction: float = 0.0,
    seed: int = 202307,
    workers: int = 1,
    listing: str | None = None,
    overwrite: bool = False,
    wait: bool = False,
) -> Entry:
    """Index of the volume store made of a source's cases.

    Structures below options.min_volume stay in the masks but are no objects. Cases packed before
    from the same files with the same options are kept. The store that is there stays until the
    new one is whole. Raises ValueError, one line a fault, if a case cannot be packed, or if no
    object is left.
    """
    with new_store(output, "preparing", overwrite=overwrite, keep=True, wait=wait) as new:
        jobs = _jobs(source, options, new, output)
        check_jobs(source, jobs, test_fraction)
        entries = with_test_cases(pack_all(pack_volume, jobs, workers), test_fraction, seed)
        if not any(entry["objects"] for entry in entries):
            raise ValueError(
                f"no structure of {options.min_volume:g} cm3 or more in"
                f" {counted(len(entries), 'case')}; lower --min_volume or check the labels"
            )
        index = {
            "dataset": source.name,
            "classes": classes_or_numbers(source, entries),
            "min_volume": options.min_volume,
            "source": sources_digest(entries),
            "listing": listing,
            "cases": entries,
        }
        keep_only(new, entries)
        write_volume_index(new, index)
    return VolumeStore(output).index


def pack_volume(job: Job) -> Entry:
    """The case's index entry, with arrays and record written unless they are there already.

    Raises ValueError or FileNotFoundError naming the file: a scan or label that cannot be read, a
    label that is not binary in SAM-Med3D's layout, image and label in different places.
    """
    key = job.key()
    entry = finished_case(job, key)
    if entry is not None:
        return entry
    scan = read_volume(job.case.image, job.case.channel, job.case.series)
    label = _read_label(job, scan.grid.header)
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
    entry = write_volume(job.folder, entry, scan.image, mask, objects=objects)
    return finish_case(job, key, entry)


def _read_label(job: Job, image: ScanHeader) -> Scan:
    """The label in class ids, as stored, on the image's header if that is to be trusted."""
    options = job.options
    num_classes = len(options.names) if options.names and options.binary is None else None
    label = label_on(job.case, image, num_classes, not options.ignore_label_affine)
    if options.binary is None:
        return label
    where = f"{job.case.label}: {LAYOUT} has binary labels; use images and labels folders"
    check_label_ids(label.array, 2, where)
    return Scan(label.array * np.uint8(options.binary), label.header)


def _sorted_out(job: Job, label: Scan, mask: np.ndarray) -> tuple[list[int], list[str]]:
    """Ids of the label's objects, and a line for each structure that is excluded."""
    voxel = abs(np.linalg.det(label.affine[:3, :3])) / 1000  # cm3
    before, after = (
        np.bincount(array.ravel(order="K"), minlength=256) for array in (label.array, mask)
    )
    objects, dropped, smallest = [], [], job.options.min_volume
    for number in np.flatnonzero(before[1:]) + 1:
        name = job.options.names[number] if job.options.names else f"class {number}"
        volume = before[number] * voxel
        if volume < smallest:
            dropped.append(f"{job.case.id}: {name}: {volume:.3g} cm3, below {smallest:g}")
        elif not after[number]:
            dropped.append(f"{job.case.id}: {name}: no voxel left at 1.5 mm")
        else:
            objects.append(int(number))
    if not objects and not dropped:
        dropped.append(f"{job.case.id}: the label is empty")
    return objects, dropped


def _jobs(source: Source, options: VolumeOptions, folder: Path, before: Path) -> list[Job]:
    names = tuple(row["name"] for row in source.classes or ())
    options = replace(options, names=names)
    if source.name != "layout":
        return [Job(case, options, folder, before) for case in source.cases]
    return [
        Job(case, replace(options, binary=names.index(class_of(case.id))), folder, before)
        for case in source.cases
    ]


def _listing_digest(source: Source) -> str:
    """Hex digest of the names, sizes and times of a source's files."""
    digest = hashlib.sha256(f"volumes {VolumeOptions.packing}".encode())
    for case in source.cases:
        for path in (case.image, case.label):
            stat = path.stat()
            line = f"{case.id}\0{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
