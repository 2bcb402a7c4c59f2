"""Which scans the paths of a command line name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dataset.scans.read import SCAN_SUFFIXES


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
