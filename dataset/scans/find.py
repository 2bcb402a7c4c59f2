"""Which files and folders are scans, by their names and first bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".npz")


def scan_stem(path: Path) -> str:
    """Name of a scan file without its scan suffix (.nii.gz counts as one), or of its folder."""
    for suffix in SCAN_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def is_scan_name(name: str) -> bool:
    """Whether a file's name ends as that of a scan."""
    return name.lower().endswith(SCAN_SUFFIXES)


def is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM does: with its mark behind a preamble, or with its tags."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(132)
    return start[128:] == b"DICM" or (start[:2] == b"\x08\x00" and start[2:4] < b"\x20\x00")


def find_scans(paths: Iterable[Path]) -> list[Path]:
    """The scans that paths name: files, DICOM series folders, and all scans inside other folders.

    A missing path, or a folder of neither, stays in the list; opening it says what is wrong.
    """
    found = []
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else []
        inside = [
            file for file in files if is_scan_name(file.name) and not file.name.startswith(".")
        ]
        if not inside or any(is_dicom(file) for file in files):
            inside = [path]
        found += inside
    return found


def files_of(path: Path) -> list[Path]:
    """The files whose bytes make a scan, sorted: those of a folder and the folders inside it, or
    the file and, for .nhdr and .mhd, the file of its voxels."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix.lower() in (".nhdr", ".mhd"):
        from dataset.scans.itk import voxel_file

        voxels = voxel_file(path)
        return [path, voxels] if voxels else [path]
    return [path]
