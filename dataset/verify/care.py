"""Checks of a CARE release: its npz slices, its CSVs, and both together.

Files are read by dataset.care, as for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import care as rectum
from dataset.files import array_digest
from dataset.scans.read import read_scan
from dataset.verify.scans import (
    Checked,
    Finding,
    check_counts,
    compare_cases,
    relative,
)

STORED_HU = (-1.0, 2.0)  # the release's images lie about [0, 1]


@dataclass(frozen=True)
class SliceJob:
    """A slice to check: its file, its split, and its row of the CSV, if it has one."""

    path: Path
    root: Path
    split: str
    box: tuple[float, ...] | None


def care_jobs(root: Path) -> tuple[list[SliceJob], list[Finding]]:
    """The slices found, and findings on the CSVs: bad rows, missing files or rows."""
    jobs, findings = [], []
    for split in ("train", "test"):
        folder, table = root / split / f"{split}_npz", root / split / f"{split}_bbox.csv"
        if not folder.is_dir() and not table.is_file():
            findings.append(Finding("warning", split, "no such split in this release"))
            continue
        boxes = None
        try:
            boxes = rectum.read_boxes(table)
        except FileNotFoundError:
            findings.append(Finding("error", relative(table, root), "is missing"))
        except (ValueError, OSError) as error:
            text = str(error).removeprefix(str(table)).lstrip(":, ")
            findings.append(Finding("error", relative(table, root), text))
        files = sorted(folder.glob("*.npz")) if folder.is_dir() else []
        present = {file.stem for file in files}
        for name in sorted((boxes or {}).keys() - present):
            what = f"names {name!r}, but {folder.name} has no such npz"
            findings.append(Finding("error", relative(table, root), what))
        for file in files:
            if boxes is not None and file.stem not in boxes:
                findings.append(Finding("error", relative(file, root), f"is not in {table.name}"))
            jobs.append(SliceJob(file, root, split, (boxes or {}).get(file.stem)))
    return jobs, findings


def check_slice(job: SliceJob) -> Checked:
    """All findings on one npz of the release, which is read in full."""
    case = rectum.case_of(job.path.stem)[0]
    checked = Checked(case, job.split, relative(job.path, job.root))
    try:
        image, label = rectum.read_slice(job.path)
        stored = read_scan(job.path).array
    except (ValueError, OSError) as error:
        checked.error(error)
        return checked
    checked.fingerprint = array_digest(image)
    counts = np.bincount(label.ravel(), minlength=3)
    check_counts(checked, counts, may_be_empty=job.box is None)
    low, high = float(stored.min()), float(stored.max())
    if low == high:
        checked.warning(f"every pixel is {low:g}")
    elif low < STORED_HU[0] or high > STORED_HU[1]:
        checked.warning(f"values {low:g} to {high:g}; expected about 0 to 1")
    if job.box is not None and not (min(job.box) >= 0 and max(job.box) <= max(image.shape)):
        checked.warning(f"its box {list(job.box)} extends beyond the image of {image.shape}")
    return checked


def check_care(root: Path, run: Callable[..., Iterator[Checked]]) -> tuple[list[Finding], int]:
    """(findings, files read) of a release; `run` maps check_slice over the jobs."""
    jobs, findings = care_jobs(root)
    cases = list(run(check_slice, jobs))
    for case in cases:
        findings += case.findings
    findings += compare_cases(cases)
    return findings, len(jobs)
