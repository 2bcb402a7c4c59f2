"""What can be wrong or odd about one labelled scan, and about all cases of a set together.

`verify` runs these; nothing here writes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dataset.prepare.sources import CaseFiles
from dataset.scans.header import ScanHeader
from dataset.scans.orientation import geometry_difference
from dataset.scans.read import read_header, read_label, read_scan

TINY = 10  # voxels; fewer of a class are more often a slip of the pen than an organ
AIR_HU = (-2048.0, -500.0)  # between these lies the lowest value of a CT in HU
TISSUE_HU = (100.0, 6000.0)  # and between these the highest
OUTLIER = 2.0  # times the median spacing, or a part of it


@dataclass(frozen=True)
class Finding:
    """Something wrong or odd about a file; `what` is one line."""

    level: str  # "wrong" or "odd"
    file: str
    what: str


@dataclass
class Checked:
    """What was found about a case, and what the comparison with other cases needs.

    spacing (between slices, in plane) mm or None; fingerprint: digest of the image's values.
    """

    id: str
    split: str
    file: str
    findings: list[Finding] = field(default_factory=list)
    spacing: tuple[float, float] | None = None
    fingerprint: str | None = None

    def wrong(self, what: object, file: str | None = None) -> None:
        """Notes a fault of the case's image, or of another file."""
        self.findings.append(Finding("wrong", file or self.file, _without(str(what))))

    def odd(self, what: str, file: str | None = None) -> None:
        """Notes an oddity of the case's image, or of another file."""
        self.findings.append(Finding("odd", file or self.file, what))


def _without(text: str) -> str:
    """An error's text on one line, without the path that it starts with."""
    text = " ".join(text.split())
    head, colon, rest = text.partition(": ")
    return rest if colon and "/" in head and " " not in head else text


@dataclass(frozen=True)
class ScanJob:
    """A case to check: its files, the folder they are named from, the size of its label table."""

    case: CaseFiles
    root: Path
    num_classes: int | None
    is_ct: bool


def check_scan(job: ScanJob) -> Checked:
    """Everything about one image and its label, each read whole."""
    case = job.case
    checked = Checked(case.id, case.split, relative(case.image, job.root))
    label_file = relative(case.label, job.root)
    headers: list[ScanHeader] = []
    for path, name in ((case.image, checked.file), (case.label, label_file)):
        try:
            headers.append(read_header(path))
        except (ValueError, OSError) as error:
            checked.wrong(error, name)
    if len(headers) == 2:
        _check_geometry(checked, *headers, label_file)
    if headers and headers[0].path == case.image:
        _check_image(checked, job)
    if headers and headers[-1].path == case.label:
        _check_label(checked, job, label_file)
    return checked


def _check_geometry(
    checked: Checked, image: ScanHeader, label: ScanHeader, label_file: str
) -> None:
    difference = geometry_difference(image, label)
    if difference:
        checked.wrong(f"does not lie on its image: {difference}", label_file)
    if image.affine is None or label.affine is None:
        return
    axes = ["".join(nib.aff2axcodes(header.affine)) for header in (image, label)]
    if axes[0] != axes[1]:
        checked.odd(f"axes {axes[1]}, the image has {axes[0]}", label_file)
    for remark in image.remarks:
        checked.odd(remark)
    if image.spacing is None:
        return
    x, y, z = nib.io_orientation(image.affine)[:, 0].argsort()
    checked.spacing = image.spacing[z], (image.spacing[x] * image.spacing[y]) ** 0.5


def _check_image(checked: Checked, job: ScanJob) -> None:
    try:
        array = read_scan(job.case.image, job.case.channel).array
    except (ValueError, OSError) as error:
        checked.wrong(error)
        return
    checked.fingerprint = fingerprint(array)
    low, high = float(array.min()), float(array.max())
    if low == high:
        checked.odd(f"every voxel is {low:g}")
    elif job.is_ct and not (AIR_HU[0] <= low <= AIR_HU[1] and TISSUE_HU[0] <= high <= TISSUE_HU[1]):
        checked.odd(f"values {low:g} to {high:g} are unusual for HU")


def _check_label(checked: Checked, job: ScanJob, label_file: str) -> None:
    try:
        label = read_label(job.case.label, job.num_classes).array
    except (ValueError, OSError) as error:
        checked.wrong(error, label_file)
        return
    counts = sum(
        np.bincount(plane.ravel(order="K"), minlength=256) for plane in label.T
    )  # a plane at a time: bincount copies to 64 bits
    check_counts(checked, counts, label_file)


def check_counts(
    checked: Checked, counts: np.ndarray, file: str | None = None, *, may_be_empty: bool = False
) -> None:
    """Notes an empty label and classes of a few voxels; counts is voxels per label id."""
    if not counts[1:].any():
        note = checked.odd if may_be_empty else checked.wrong
        note("empty label: nothing but background", file)
    for class_id in np.flatnonzero((counts > 0) & (counts < TINY)):
        if class_id > 0:
            checked.odd(f"class {class_id} has {counts[class_id]} voxels only", file)


def fingerprint(array: np.ndarray) -> str:
    """Digest of an array's shape and values."""
    digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array.ravel(order="K")).view(np.uint8))
    return digest.hexdigest()


def relative(path: Path, root: Path) -> str:
    """The path as seen from root where it lies below it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


@dataclass(frozen=True)
class StoreJob:
    """One case of a prepared store, by its place in the index."""

    folder: Path
    number: int


def check_prepared(
    open_store: Callable[[Path], Any],
    folder: Path,
    run: Callable[..., Iterator[Checked]],
    check_case: Callable[[StoreJob], Checked],
) -> tuple[list[Finding], list[Checked], Any]:
    """(findings, its cases, the store) of slices or volumes; the store is None if it won't open.

    `run` maps check_case over the jobs; what one kind of store alone can have is its caller's.
    """
    try:
        store = open_store(folder)
    except (ValueError, OSError) as error:
        return [Finding("wrong", "index.json", without_folder(error, folder))], [], None
    cases = list(run(check_case, [StoreJob(folder, n) for n in range(len(store.cases))]))
    findings = [finding for case in cases for finding in case.findings]
    findings += compare_cases(cases)
    findings += unknown_files(store.folder, store.cases)
    return findings, cases, store


def unknown_files(folder: Path, cases: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """What lies among the arrays of a store and belongs to none of its cases."""
    known = {case["file"] for case in cases}
    for path in sorted((folder / "cases").iterdir()):
        stem = path.name.removesuffix(".npy").removesuffix(".image").removesuffix(".mask")
        if stem.removesuffix(".json") not in known:
            yield Finding("odd", f"cases/{path.name}", "is not in the index")


def without_folder(error: object, folder: Path) -> str:
    """An error's text on one line, without the folder that the reader already knows."""
    return " ".join(str(error).replace(f"{folder}/", "").split())


def compare_cases(cases: Sequence[Checked]) -> Iterator[Finding]:
    """Cases in two splits, the same image twice, and spacings unlike the others'."""
    yield from _in_two_splits(cases)
    yield from _same_images(cases)
    measured = [case for case in cases if case.spacing]
    if len(measured) < 3:
        return
    medians = np.median([case.spacing for case in measured], axis=0)
    for case in measured:
        for name, size, usual in zip(
            ("between slices", "in plane"), case.spacing, medians, strict=True
        ):
            if not usual / OUTLIER <= size <= usual * OUTLIER:
                what = f"spacing {name} {size:.3g} mm; the median is {usual:.3g}"
                yield Finding("odd", case.file, what)


def _in_two_splits(cases: Sequence[Checked]) -> Iterator[Finding]:
    splits: dict[str, dict[str, Checked]] = defaultdict(dict)
    for case in cases:
        splits[case.id].setdefault(case.split, case)
    for case_id, found in sorted(splits.items()):
        if len(found) > 1:
            *others, last = found.values()
            where = ", ".join(f"{other.split} ({other.file})" for other in others)
            yield Finding("wrong", last.file, f"case {case_id} is in {last.split} and in {where}")


def _same_images(cases: Sequence[Checked]) -> Iterator[Finding]:
    first: dict[str, Checked] = {}
    for case in cases:
        if case.fingerprint is None:
            continue
        other = first.setdefault(case.fingerprint, case)
        if other is not case and (other.id, other.split) != (case.id, case.split):
            level = "odd" if other.split == case.split else "wrong"
            what = f"the same image as {other.file} ({other.split}, this one {case.split})"
            yield Finding(level, case.file, what)
