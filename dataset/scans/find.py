"""Which scans the paths of a command line name, and what to call their results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dataset.scans.read import SCAN_SUFFIXES, scan_stem


def find_scans(paths: Iterable[Path]) -> list[Path]:
    """The scans that paths name: files, DICOM series folders, and all scans inside other folders.

    A missing path, or a folder of neither, stays in the list; opening it says what is wrong.
    """
    found = []
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else []
        inside = [
            file
            for file in files
            if file.name.lower().endswith(SCAN_SUFFIXES) and not file.name.startswith(".")
        ]
        if not inside or any(_is_dicom(file) for file in files):
            inside = [path]
        found += inside
    return found


def _is_dicom(file: Path) -> bool:
    """Whether a file carries DICOM's mark behind its preamble."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def output_names(scans: Iterable[Path]) -> list[str]:
    """A name for each scan's results: that of its file or folder, without the suffix.

    Scans of one name get the folder's name in front, and if need be a number behind.
    """
    scans = [scan.absolute() for scan in scans]
    stems = [scan_stem(scan) for scan in scans]
    names = []
    for scan, stem in zip(scans, stems, strict=True):
        name = base = stem if stems.count(stem) == 1 else f"{scan.parent.name}_{stem}"
        number = 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names
