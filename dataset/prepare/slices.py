"""Builds a slice store from labelled scans: windowed, upright slices, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import write_json
from dataset.prepare.cases import (
    Job,
    check_jobs,
    classes_or_numbers,
    finish_case,
    finished_case,
    keep_only,
    label_on,
    pack_all,
    shows,
    sources_digest,
    with_test_cases,
)
from dataset.prepare.sources import Source
from dataset.prepare.summary import left_out_lines
from dataset.scans.header import Scan
from dataset.scans.in_plane import body_box, crop, resample_in_plane
from dataset.scans.orientation import to_canonical
from dataset.scans.read import read_scan
from dataset.scans.window import Window, apply_window, window_limits, window_misfit
from dataset.splits import cross_validation, read_fold, split_table
from dataset.store.folder import Entry, new_store
from dataset.store.slices import SliceStore, write_case, write_index


@dataclass(frozen=True)
class SliceOptions:
    """Options that decide a case's bytes; spacing in mm, None for the native in-plane size."""

    window: Window
    spacing: float | None = None
    body_crop: bool = False
    num_classes: int | None = None
    ignore_label_affine: bool = False
    packing: int = 2  # raise it when packing changes: earlier cases are then packed again


def prepare_scans(
    source: Source,
    output: Path,
    options: SliceOptions,
    *,
    clahe: bool = False,
    test_fraction: float = 0.0,
    folds: int | None = None,
    seed: int = 202307,
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[Entry, list[str]]:
    """Makes a store of a source's cases: (index, lines on what was left out).

    Cases packed before from the same files with the same options are kept as they are. The store
    that is there stays until the new one is whole. Raises ValueError, one line a fault, if a case
    cannot be packed.
    """
    num_classes = len(source.classes) if source.classes else None
    options = replace(options, num_classes=num_classes)
    with new_store(output, "preparing", overwrite=overwrite, keep=True) as new:
        jobs = [Job(case, options, new, output) for case in source.cases]
        check_jobs(source, jobs, test_fraction)
        if folds:  # refused before the first case is packed, if at all
            cross_validation({job.case.id for job in jobs if job.case.split == "train"}, folds, 0)
        before = _options_before(output)
        entries = with_test_cases(pack_all(pack_case, jobs, workers), test_fraction, seed)
        index = {
            **asdict(options),
            "dataset": source.name,
            "classes": classes_or_numbers(source, entries),
            "orientation": "LPS",
            "clahe": clahe,
            "source": sources_digest(entries),
            "cases": entries,
        }
        keep_only(new, entries)
        write_splits(new, entries, folds=folds, seed=seed)
        write_index(new, index)
    index = SliceStore(output).index
    return index, [*left_out_lines(source), *_changed_lines(before, index, folds)]


def write_splits(folder: Path, cases: Sequence[Entry], *, folds: int | None, seed: int) -> None:
    """Writes the splits.json of a store: training, validation and test cases, and the folds."""
    places = [(entry["id"], entry["split"]) for entry in cases]
    table = split_table(places, folds=folds, seed=seed, shows=shows(cases, "train"))
    write_json(folder / "splits.json", table)


def pack_case(job: Job) -> Entry:
    """The case's index entry, with arrays and record written unless they are there already.

    Holds one volume at a time. Raises ValueError or FileNotFoundError naming the file: a scan or
    label that cannot be read, labels outside the table, image and label in different places, a
    window that does not suit the scan.
    """
    key = job.key()
    entry = finished_case(job, key)
    if entry is not None:
        return entry
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
    return finish_case(job, key, write_case(job.folder, entry, image, mask))


def _pack_image(job: Job) -> tuple[np.ndarray, dict[str, Any], Scan]:
    """uint8 slices, their entries for the index, and the scan's header with an empty array."""
    options = job.options
    scan = read_scan(job.case.image, job.case.channel, job.case.series)
    volume = to_canonical(scan)
    _check_window(job, volume.slices)
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


def _check_window(job: Job, slices: np.ndarray) -> None:
    """Raises ValueError if a fixed window does not suit a scan whose own percentiles would.

    A scan of one value, or of a few, is no fault of the window.
    """
    misfit = window_misfit(slices, job.options.window)
    if job.options.window != "percentile" and misfit and not window_misfit(slices, "percentile"):
        low, high = window_limits(slices, "percentile")
        raise ValueError(
            f"{job.case.image}: {misfit}; pass --window percentile or --window {low:.3g} {high:.3g}"
        )


def _pack_label(job: Job, scan: Scan, box: list[int] | None) -> np.ndarray:
    options = job.options
    label = label_on(job.case, scan.header, options.num_classes, not options.ignore_label_affine)
    volume = to_canonical(label)
    if box:
        volume = crop(volume, tuple(box))
    if options.spacing:
        volume = resample_in_plane(volume, options.spacing, labels=True)
    return volume.slices


def _options_before(output: Path) -> Entry:
    """How an existing store was made, and whether it has folds; empty if there is none."""
    try:
        index = SliceStore(output).index
    except (ValueError, OSError):
        return {}
    options = {name: index.get(name) for name in ("window", "spacing", "body_crop", "clahe")}
    with suppress(ValueError, OSError):
        options["folds"] = bool(read_fold(output, 0))
    return options


def _changed_lines(before: Entry, index: Entry, folds: int | None) -> list[str]:
    """How the store differs from the previous one, `before`."""
    lines = [
        f"replaces a store with another {name}: {index[name]} (was {value})"
        for name, value in before.items()
        if name != "folds" and index[name] != value
    ]
    if before.get("folds") and not folds:
        lines.append("the previous store's folds are gone; pass --folds to write new ones")
    return lines
