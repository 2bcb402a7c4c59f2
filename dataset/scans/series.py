"""DICOM series of a folder: which there are, and how the slices of one make a volume.

Every slice is taken at its own word: where its position, orientation or pixel size does not fit
the others, the series is refused with the reason.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.scans.dicom import DicomFile, DicomSlice, read_dicom, read_stored
from dataset.scans.find import is_dicom
from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    ScanHeader,
    check_header,
    mm_text,
    narrow,
    size_text,
)
from dataset.scans.places import TURN_TOLERANCE, even_step, places, straightened
from dataset.text import counted

MAX_FILES = 100_000
MAX_DEPTH = 6
LISTED_SERIES = 12
SPACING_TOLERANCE = 1e-3  # relative, in plane
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class DicomSeries:
    """A series whose headers were read; volumes: the slices of each volume in order."""

    header: ScanHeader
    volumes: tuple[tuple[DicomSlice, ...], ...]

    def voxels(self, channel: int) -> np.ndarray:
        """(I, J, K) values of one volume, each slice rescaled as its own header says."""
        slices = self.volumes[channel]
        whole = all(_is_whole(one.slope) and _is_whole(one.intercept) for one in slices)
        out: np.ndarray | None = None
        held: tuple[Path | None, np.ndarray | None] = (None, None)
        for k, one in enumerate(slices):
            if held[0] != one.file:
                held = one.file, read_stored(one.file)
            plane = _rescaled(held[1][one.frame], one, whole=whole)
            if plane.shape != (one.size[1], one.size[0]):
                raise ValueError(f"{one.file}: pixel data of another size than its header states")
            plane = narrow(one.file, plane)
            if out is None:
                out = np.empty((len(slices), *plane.shape), plane.dtype)
            elif plane.dtype != out.dtype:  # int16 and uint8 meet in int16, all else in float32
                out = out.astype(_common(out.dtype, plane.dtype), copy=False)
            out[k] = plane
        return out.transpose(2, 1, 0)


def _is_whole(value: float) -> bool:
    return value.is_integer() and abs(value) < 2**31


def _common(first: np.dtype, second: np.dtype) -> type:
    return np.float32 if np.float32 in (first.type, second.type) else np.int16


def _rescaled(stored: np.ndarray, one: DicomSlice, *, whole: bool) -> np.ndarray:
    """Stored numbers (rows, columns) times slope plus intercept; integers if they fit int16."""
    if stored.dtype.kind not in "iu" or not whole:
        return stored.astype(np.float64) * one.slope + one.intercept
    if one.slope == 1 and one.intercept == 0 and stored.dtype == np.uint8:
        return stored
    values = stored.astype(np.int64) * int(one.slope) + int(one.intercept)
    fits = values.min() >= -32768 and values.max() <= 32767
    return values.astype(np.int16 if fits else np.float64)


# ------------------------------------------------------------------ which series


def open_series(folder: Path, number: int | None = None) -> DicomSeries:
    """The only DICOM series in a folder and the folders inside it, or number `number` of its list.

    Raises ValueError, in at most two lines, for none, for several and none chosen, for series that
    are no scans, and for slices that make no volume.
    """
    found = series_of(folder)
    if not found:
        raise ValueError(f"{folder}: holds no DICOM series")
    if number is None and len(found) > 1:
        raise ValueError(
            f"{folder}: holds {len(found)} DICOM series; choose one with --series NUMBER:\n"
            f"  {_list_text(found)}"
        )
    if not 1 <= (number or 1) <= len(found):
        raise ValueError(
            f"{folder}: no series {number}; it holds {len(found)}:\n  {_list_text(found)}"
        )
    return _opened(folder, found[(number or 1) - 1])


def series_of(folder: Path) -> list[list[DicomFile]]:
    """Files of every DICOM series in a folder and the folders inside it, by series number.

    Files without an image that accompany the others (reports, plans, contours) are left out.
    Raises ValueError for a DICOM file that cannot be read.
    """
    groups: dict[str, list[DicomFile]] = {}
    for path in dicom_files(folder):
        file = read_dicom(path)
        if file is not None:
            groups.setdefault(file.series, []).append(file)
    images = [files for files in groups.values() if any(file.has_image for file in files)]
    chosen = images or list(groups.values())
    return sorted(chosen, key=lambda g: (g[0].series_number or 0, g[0].series))


def dicom_files(folder: Path) -> list[Path]:
    """DICOM files of a folder and the folders inside it, sorted by path, without hidden ones.

    Raises ValueError for a file named .dcm that is none: it may be a slice that was damaged.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = [n for n in sorted(folders) if not n.startswith(".") and depth < MAX_DEPTH]
        found += [Path(place) / name for name in sorted(names) if not name.startswith(".")]
        if len(found) > MAX_FILES:
            raise ValueError(f"{folder}: holds over {MAX_FILES} files; name a folder inside it")
    for path in found:
        if path.suffix.lower() == ".dcm" and path.is_file() and not is_dicom(path):
            raise ValueError(f"{path}: not a DICOM file; a slice may be damaged")
    return [path for path in found if is_dicom(path)]


def _list_text(found: Sequence[Sequence[DicomFile]]) -> str:
    """A line with the number, modality, geometry and number of slices of every series."""
    parts = [f"{n}: {_series_text(files)}" for n, files in enumerate(found[:LISTED_SERIES], 1)]
    more = [f"{len(found) - LISTED_SERIES} more"] if len(found) > LISTED_SERIES else []
    return "; ".join(parts + more)


def _series_text(files: Sequence[DicomFile]) -> str:
    slices = [one for file in files for one in file.slices]
    if not slices:
        return files[0].problem
    first = slices[0]
    parts = [files[0].modality or "no modality", size_text(first.size)]
    if first.spacing:
        parts.append(mm_text(first.spacing))
    planes = {_plane(one.axes) for one in slices if one.axes is not None}
    parts += sorted(planes)[:3] + [counted(len(slices), "slice")]
    return " ".join([parts[0], ", ".join(parts[1:])])


def _plane(axes: np.ndarray) -> str:
    normal = np.abs(np.cross(*axes))
    name = ("sagittal", "coronal", "axial")[int(normal.argmax())]
    return name if normal.max() > 0.999 else f"oblique {name}"


# ------------------------------------------------------------------ one series as a volume


def _opened(folder: Path, files: Sequence[DicomFile]) -> DicomSeries:
    for file in files:
        if file.problem:
            raise ValueError(f"{file.path}: {file.problem}")
    slices = [one for file in files for one in file.slices]
    copies = [uid for uid, count in Counter(file.uid for file in files).items() if count > 1]
    if copies:
        first, second = [file.path.name for file in files if file.uid == copies[0]][:2]
        raise ValueError(f"{folder}: duplicate: {first} and {second} are copies of one image")
    stated = [file for file in files if file.frame_of_reference]
    others = [f for f in stated if f.frame_of_reference != stated[0].frame_of_reference]
    if others:
        raise ValueError(
            f"{folder}: {others[0].path.name} lies in another frame of reference than"
            f" {stated[0].path.name}; their positions cannot be compared"
        )
    _check_alike(folder, slices)
    volumes, affine, facts, remarks = _arranged(folder, slices)
    if any(file.inverted for file in files):
        remarks += ("MONOCHROME1: values are as stored, viewers show them inverted",)
    columns, rows = slices[0].size
    header = ScanHeader(
        folder, "dicom", (columns, rows, len(volumes[0])), len(volumes), files[0].dtype,
        affine, remarks=remarks, **facts,
    )  # fmt: skip
    size = sum(file.path.stat().st_size for file in files)
    claimed = math.prod(header.shape) * header.channels
    header = check_header(header, claimed=claimed, available=size * MAX_DEFLATE_RATIO)
    return DicomSeries(header, volumes)


def _check_alike(folder: Path, slices: Sequence[DicomSlice]) -> None:
    """Raises ValueError for slices of other sizes, pixel spacings or orientations than the first.

    What some state and others do not is a difference as well.
    """
    first = slices[0]
    for what, stated in (
        ("position", [one.position is not None for one in slices]),
        ("orientation", [one.axes is not None for one in slices]),
        ("pixel spacing", [one.spacing is not None for one in slices]),
    ):
        if len(set(stated)) > 1:
            raise ValueError(f"{folder}: {stated.count(False)} of {len(slices)} slices state no"
                             f" {what}, {slices[stated.index(False)].name} for one")  # fmt: skip
    turns = [_turn(first, one) for one in slices]
    if max(turns) > TURN_TOLERANCE:
        worst = int(np.argmax(turns))
        raise ValueError(
            f"{folder}: {slices[worst].name} is turned by {math.degrees(turns[worst]):.3g}"
            f" degrees against {first.name}; the slices of a volume are parallel"
        )
    for one in slices:
        if one.size != first.size:
            raise ValueError(
                f"{folder}: images of different sizes, {first.name} {size_text(first.size)} and"
                f" {one.name} {size_text(one.size)} pixels"
            )
        if first.spacing and not np.allclose(
            one.spacing, first.spacing, rtol=SPACING_TOLERANCE * (1 + 1e-6), atol=0
        ):
            raise ValueError(
                f"{folder}: pixels of different sizes, {first.name} {mm_text(first.spacing)} and"
                f" {one.name} {mm_text(one.spacing)}"
            )


def _turn(first: DicomSlice, other: DicomSlice) -> float:
    """The angle (rad) between the orientations of two slices; 0 if none is stated."""
    if first.axes is None:
        return 0.0
    frames = [np.stack([*one.axes, np.cross(*one.axes)]) for one in (first, other)]
    cosine = (np.trace(frames[0].T @ frames[1]) - 1) / 2
    small = np.linalg.norm(frames[0] - frames[1]) / math.sqrt(2)  # exact where the cosine is not
    return float(small) if small < 0.1 else float(np.arccos(np.clip(cosine, -1, 1)))


Arranged = tuple[tuple[tuple[DicomSlice, ...], ...], np.ndarray, dict[str, bool], tuple[str, ...]]


def _arranged(folder: Path, slices: Sequence[DicomSlice]) -> Arranged:
    """(volumes in order, affine index -> RAS mm, whether oriented and sized, remarks)."""
    first = slices[0]
    facts = {
        "oriented": first.axes is not None,
        "sized": first.spacing is not None and first.axes is not None,
    }
    if first.position is None:
        return _by_number(slices, facts)
    positions = np.array([one.position for one in slices])
    axes = _guessed_axes(positions) if first.axes is None else first.axes
    heights = positions @ np.cross(*axes)
    groups = places(heights)
    counts = {len(group) for group in groups}
    if len(groups) == 1 and len(slices) > 1:
        raise ValueError(f"{folder}: all {len(slices)} slices lie at one position")
    if len(counts) > 1:
        twice = [slices[n] for n in max(groups, key=len)][:2]
        raise ValueError(
            f"{folder}: duplicate: {twice[0].name} and {twice[1].name} lie at the same position"
        )
    volumes = _volumes([[slices[n] for n in group] for group in groups])
    for volume in volumes:
        step = even_step(folder, volume, np.cross(*axes))
    if len(groups) == 1:
        facts["sized"] &= first.thickness is not None
        step = np.cross(*axes) * (first.thickness or 1.0)
    axes, step = straightened(axes, step, len(groups))
    return volumes, _affine(volumes[0][0], axes, step), facts, ()


def _by_number(slices: Sequence[DicomSlice], facts: dict[str, bool]) -> Arranged:
    """Slices without a position, in the order of their instance numbers or else of file names."""
    numbers = [one.number for one in slices if one.frame == 0]
    numbered = None not in numbers and len(set(numbers)) == len(numbers)
    key = (lambda s: (s.number, s.frame)) if numbered else (lambda s: (str(s.file), s.frame))
    ordered = tuple(sorted(slices, key=key))
    axes = np.eye(3)[:2] if ordered[0].axes is None else ordered[0].axes
    one = len(slices) == 1 and ordered[0].thickness is not None
    step = np.cross(*axes) * (ordered[0].thickness if one else 1.0)
    how = "instance numbers" if numbered else "file names"
    remarks = () if len(slices) == 1 else (f"its slices state no position; ordered by {how}",)
    facts = facts | {"sized": facts["sized"] and one}
    return (ordered,), _affine(ordered[0], axes, step), facts, remarks


def _guessed_axes(positions: np.ndarray) -> np.ndarray:
    """Axes (2, 3) of slices without an orientation, from the line that their positions follow."""
    along = int(np.ptp(positions, axis=0).argmax()) if len(positions) > 1 else 2
    return np.array(
        {0: ([0, 1, 0], [0, 0, -1]), 1: ([1, 0, 0], [0, 0, -1]), 2: ([1, 0, 0], [0, 1, 0])}[along],
        dtype=np.float64,
    )


def _affine(first: DicomSlice, axes: np.ndarray, step: np.ndarray) -> np.ndarray:
    """(4, 4) index (column, row, slice) -> RAS mm."""
    across, down = first.spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([axes[0] * across, axes[1] * down, step], axis=1)
    if first.position is not None:
        affine[:3, 3] = first.position
    affine[:3] *= LPS_TO_RAS[:, None]
    return affine


def _volumes(by_place: list[list[DicomSlice]]) -> tuple[tuple[DicomSlice, ...], ...]:
    """The volumes of a series with equally many slices at each position, ordered by what differs.

    The first attribute that tells the slices of every place apart, alike at all places, counts;
    without one the instance numbers do.
    """
    count = len(by_place[0])
    order = [
        sorted(place, key=lambda s: (s.number or 0, str(s.file), s.frame)) for place in by_place
    ]
    for key in range(len(by_place[0][0].differs) if count > 1 else 0):
        sets = {frozenset(one.differs[key] for one in place) for place in by_place}
        if len(sets) == 1 and len(next(iter(sets))) == count:
            order = [sorted(place, key=lambda s: _natural(s.differs[key])) for place in by_place]
            break
    return tuple(tuple(place[n] for place in order) for n in range(count))


def _natural(text: str) -> tuple[float, str]:
    """A sort key that puts numbers in numerical order."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text
