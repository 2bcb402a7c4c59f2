"""Checks of one labelled scan, and of all cases of a data set together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from dataset.files import array_digest
from dataset.prepare.sources import CaseFiles
from dataset.scans.header import ScanHeader
from dataset.scans.orientation import geometry_difference
from dataset.scans.read import read_header, read_label, read_scan
from dataset.text import counted

TINY = 10  # voxels; fewer of a class are more often a mistake in drawing than an organ
AIR_HU = (-2048.0, -500.0)  # between these lies the lowest value of a CT in HU
TISSUE_HU = (100.0, 6000.0)  # and between these the highest
OUTLIER = 2.0  # times the median spacing, or a part of it


@dataclass(frozen=True)
class Finding:
    """An error or a warning about a file; `what` is one line."""

    level: str  # "error" or "warning"
    file: str
    what: str


@dataclass
class Checked:
    """The findings on a case, and the facts to compare it with other cases.

    spacing (between slices, in plane) mm or None; fingerprint: digest of the image's values.
    """

    id: str
    split: str
    file: str
    findings: list[Finding] = field(default_factory=list)
    spacing: tuple[float, float] | None = None
    fingerprint: str | None = None

    def error(self, what: object, file: str | None = None) -> None:
        """Notes a fault of the case's image, or of another file."""
        self.findings.append(Finding("error", file or self.file, _without(str(what))))

    def warning(self, what: str, file: str | None = None) -> None:
        """Notes a possible fault of the case's image, or of another file."""
        self.findings.append(Finding("warning", file or self.file, what))


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
    """All findings on one image and its label, which are read in full."""
    case = job.case
    checked = Checked(case.id, case.split, relative(case.image, job.root))
    label_file = relative(case.label, job.root)
    headers: list[ScanHeader] = []
    for path, name, series in (
        (case.image, checked.file, case.series),
        (case.label, label_file, None),
    ):
        try:
            headers.append(read_header(path, series))
        except (ValueError, OSError) as error:
            checked.error(error, name)
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
        checked.error(f"does not lie on its image: {difference}", label_file)
    if image.affine is None or label.affine is None:
        return
    axes = ["".join(nib.aff2axcodes(header.affine)) for header in (image, label)]
    if axes[0] != axes[1]:
        checked.warning(f"axes {axes[1]}, the image has {axes[0]}", label_file)
    for remark in image.remarks:
        checked.warning(remark)
    if image.spacing is None:
        return
    x, y, z = nib.io_orientation(image.affine)[:, 0].argsort()
    checked.spacing = image.spacing[z], (image.spacing[x] * image.spacing[y]) ** 0.5


def _check_image(checked: Checked, job: ScanJob) -> None:
    try:
        array = read_scan(job.case.image, job.case.channel, job.case.series).array
    except (ValueError, OSError) as error:
        checked.error(error)
        return
    checked.fingerprint = array_digest(array)
    low, high = float(array.min()), float(array.max())
    if low == high:
        checked.warning(f"every voxel is {low:g}")
    elif job.is_ct and not (AIR_HU[0] <= low <= AIR_HU[1] and TISSUE_HU[0] <= high <= TISSUE_HU[1]):
        checked.warning(f"values {low:g} to {high:g} are unusual for HU; try --window percentile")


def _check_label(checked: Checked, job: ScanJob, label_file: str) -> None:
    try:
        label = read_label(job.case.label, job.num_classes).array
    except (ValueError, OSError) as error:
        checked.error(error, label_file)
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
        note = checked.warning if may_be_empty else checked.error
        note("empty label: nothing but background", file)
    for class_id in np.flatnonzero((counts > 0) & (counts < TINY)):
        if class_id > 0:
            voxels = counted(int(counts[class_id]), "voxel")
            checked.warning(f"class {class_id} has only {voxels}", file)


def relative(path: Path, root: Path) -> str:
    """The path relative to root, if it is inside root."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


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
                yield Finding("warning", case.file, what)


def _in_two_splits(cases: Sequence[Checked]) -> Iterator[Finding]:
    splits: dict[str, dict[str, Checked]] = defaultdict(dict)
    for case in cases:
        splits[case.id].setdefault(case.split, case)
    for case_id, found in sorted(splits.items()):
        if len(found) > 1:
            *others, last = found.values()
            where = ", ".join(f"{other.split} ({other.file})" for other in others)
            yield Finding("error", last.file, f"case {case_id} is in {last.split} and in {where}")


def _same_images(cases: Sequence[Checked]) -> Iterator[Finding]:
    first: dict[str, Checked] = {}
    for case in cases:
        if case.fingerprint is None:
            continue
        other = first.setdefault(case.fingerprint, case)
        if other is not case and (other.id, other.split) != (case.id, case.split):
            level = "warning" if other.split == case.split else "error"
            what = f"the same image as {other.file} ({other.split}, this one {case.split})"
            yield Finding(level, case.file, what)
