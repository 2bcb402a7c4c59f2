"""Scans whose headers differ from a plain one in one field, compared with independent readers.

nibabel, pydicom and SimpleITK decide where the voxels of a file lie and what they are worth. What
is read otherwise must be refused or remarked on; sound scans must be read. Label maps of both
systems must lie where their scan lies, in nibabel and in SimpleITK.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk

from dataset.scans.header import Scan
from dataset.scans.orientation import from_canonical, to_canonical
from dataset.scans.read import read_scan
from dataset.scans.volumes import ScanVolume, grid_of, resample_label
from dataset.scans.write import write_label_map
from tests.stress.rows import Row
from tests.stress.scans import dicom, itk, nifti
from tests.stress.scans.cases import Case

NEAR = 0.02  # mm, between a place read here and by another reader
LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Reading:
    """An independent reader's result: places (P, 3) RAS mm of the voxels `indices`, and values."""

    indices: np.ndarray
    places: np.ndarray
    values: np.ndarray
    near: float = NEAR


def judged(case: Case, folder: Path) -> str:
    """What is wrong with how a case is read and written; empty if nothing is."""
    path = case.make(folder)
    try:
        scan = read_scan(path)
    except ValueError as error:
        if len(str(error).splitlines()) > 2 or not str(error).strip():
            return f"a message of {len(str(error).splitlines())} lines"
        return f"sound, but refused: {error}" if case.sound else ""
    except Exception:
        return f"a traceback: {traceback.format_exc().splitlines()[-1]}"
    said = bool(scan.header.remarks)
    if case.sound and said:
        return f"sound, but remarked on: {scan.header.remarks[0]}"
    wrong = _differs(scan, _independent(path), said=said)
    return wrong or _written(scan, path, folder, said=said)


def _independent(path: Path) -> Reading:
    if path.is_dir():
        return _by_pydicom(path)
    return _by_nibabel(path) if ".nii" in path.name else _by_simpleitk(path)


def _differs(scan: Scan, other: Reading, *, said: bool) -> str:
    """How a scan differs from what another reader found, unless a remark was made."""
    ours = nib.affines.apply_affine(scan.affine, other.indices)
    apart = float(np.abs(ours - other.places).max())
    if not apart <= other.near and not said:
        return f"lies {apart:.3g} mm elsewhere without a word"
    if scan.array.shape != other.values.shape:
        return f"has shape {scan.array.shape}, not {other.values.shape}"
    if not np.allclose(scan.array, other.values, rtol=1e-6, atol=1e-6) and not said:
        return "other values without a word"
    return ""


# ------------------------------------------------------------------ independent readers


def _corner_indices(shape: tuple[int, ...]) -> np.ndarray:
    return np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape[:3]) - 1)


def _by_nibabel(path: Path) -> Reading:
    """nibabel, in millimetres by the unit that the header names."""
    is_packed = path.read_bytes()[:2] == b"\x1f\x8b"
    if is_packed != path.name.endswith(".gz"):  # nibabel believes the name
        right = path.with_name("right.nii.gz" if is_packed else "right.nii")
        right.write_bytes(path.read_bytes())
        path = right
    image = nib.load(path)
    factor = {"meter": 1000, "micron": 0.001}.get(image.header.get_xyzt_units()[0], 1)
    corners = _corner_indices(image.shape)
    values = image.get_fdata().reshape(image.shape[:3])
    return Reading(corners, nib.affines.apply_affine(image.affine, corners) * factor, values)


def _by_simpleitk(path: Path) -> Reading:
    image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    corners = _corner_indices(values.shape)
    return Reading(corners, _itk_places(image, corners), values)


def _itk_places(image: sitk.Image, indices: np.ndarray) -> np.ndarray:
    points = [image.TransformIndexToPhysicalPoint([int(v) for v in index]) for index in indices]
    return np.array([point[:3] for point in points]) * LPS


def _by_pydicom(folder: Path) -> Reading:
    """Every slice by its own header: four corners of each, and its rescaled values."""
    planes = [
        plane
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name[0] != "." and path.suffix != ".txt"
        for plane in _planes(path)
    ]
    axes = planes[0][1]
    planes.sort(key=lambda plane: float(plane[0] @ np.cross(*axes)))
    indices, places = [], []
    for k, (position, (row, column), (down, across), values) in enumerate(planes):
        for i, j in np.ndindex(2, 2):
            i, j = i * (values.shape[1] - 1), j * (values.shape[0] - 1)
            indices.append([i, j, k])
            places.append(LPS * (position + i * across * row + j * down * column))
    values = np.stack([plane[3].T for plane in planes], axis=2)
    step = np.linalg.norm(planes[-1][0] - planes[0][0]) / max(len(planes) - 1, 1)
    near = max(0.05, 0.01 * step) + NEAR
    return Reading(np.array(indices), np.array(places), values, near)


def _planes(path: Path) -> list[tuple]:
    """(position, axes, spacing, values) of every frame; 0, the axes and 1 where none is stated."""
    content = pydicom.dcmread(path, force=True)
    if "SharedFunctionalGroupsSequence" not in content and "TransferSyntaxUID" not in getattr(
        content, "file_meta", {}
    ):
        content.file_meta = pydicom.dataset.FileMetaDataset()
        content.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    try:
        stored = content.pixel_array
    except Exception:  # no decoder for this transfer syntax in pydicom
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        return [(*_place(content), plane.astype(np.float64)) for plane in image]
    if content.BitsStored < content.BitsAllocated and not content.PixelRepresentation:
        stored = stored & ((1 << content.BitsStored) - 1)
    stored = stored.reshape(-1, content.Rows, content.Columns).astype(np.float64)
    found = []
    for number, plane in enumerate(stored):
        groups = content.get("PerFrameFunctionalGroupsSequence")
        place = _place(content) if groups is None else _frame_place(groups[number])
        own = content if groups is None else groups[number].PixelValueTransformationSequence[0]
        slope = float(own.get("RescaleSlope") or 1)
        found.append((*place, plane * slope + float(own.get("RescaleIntercept") or 0)))
    return found


def _place(content: pydicom.Dataset) -> tuple[np.ndarray, np.ndarray, list[float]]:
    axes = content.get("ImageOrientationPatient") or [1, 0, 0, 0, 1, 0]
    position = content.get("ImagePositionPatient") or [0, 0, int(content.InstanceNumber)]
    spacing = content.get("PixelSpacing") or [1, 1]
    vectors = np.array([float(v) for v in axes]).reshape(2, 3)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.array([float(v) for v in position]), vectors, [float(v) for v in spacing]


def _frame_place(frame: pydicom.Dataset) -> tuple[np.ndarray, np.ndarray, list[float]]:
    one = pydicom.Dataset()
    one.ImagePositionPatient = frame.PlanePositionSequence[0].ImagePositionPatient
    one.ImageOrientationPatient = frame.PlaneOrientationSequence[0].ImageOrientationPatient
    one.PixelSpacing = frame.PixelMeasuresSequence[0].PixelSpacing
    return _place(one)


# ------------------------------------------------------------------ label maps


def _written(scan: Scan, path: Path, folder: Path, *, said: bool) -> str:
    """What is wrong with a label map of the scan, as either system writes it."""
    label = (np.arange(scan.array.size).reshape(scan.array.shape) % 3).astype(np.uint8)
    slices = to_canonical(Scan(label, scan.header)).slices
    write_label_map(folder / "a_seg.nii.gz", from_canonical(slices, scan), scan.header)
    written = [folder / "a_seg.nii.gz"]
    try:
        grid = grid_of(scan.header)
    except ValueError:  # SAM-Med3D refuses a single slice, unknown and absurd voxel sizes
        grid = None
    if grid:
        ScanVolume(np.empty(0), grid).save(folder / "b_seg.nii", resample_label(label, grid))
        written.append(folder / "b_seg.nii")
    corners = _corner_indices(scan.array.shape)
    for file in written:
        wrong = _misplaced(file, path, scan, corners, said=said)
        if wrong:
            return f"{file.name} {wrong}"
    if not np.array_equal(np.asarray(nib.load(written[0]).dataobj), label):
        return "a label of other voxels"
    return ""


def _misplaced(file: Path, path: Path, scan: Scan, corners: np.ndarray, *, said: bool) -> str:
    """How a label map lies elsewhere than its scan, in nibabel or in SimpleITK."""
    by_nibabel = _by_nibabel(file).places
    apart = np.abs(by_nibabel - nib.affines.apply_affine(scan.affine, corners)).max()
    if not apart <= NEAR:
        return f"lies {apart:.3g} mm from its scan in nibabel"
    try:
        of_scan = _itk_places(_itk_scan(path), corners)
    except RuntimeError:  # SimpleITK knows no NIfTI-2, for one
        return ""
    try:
        by_itk = _itk_places(sitk.ReadImage(str(file)), corners)
    except RuntimeError:
        return "" if said else "cannot be opened by SimpleITK, without a word"
    apart = np.abs(by_itk - by_nibabel).max()
    if apart > 0.1 and not said:
        return f"lies {apart:.3g} mm apart in nibabel and SimpleITK, without a word"
    apart = np.abs(by_itk - of_scan).max()
    if apart > 0.1 and not said:
        return f"lies {apart:.3g} mm from its scan in SimpleITK, without a word"
    return ""


def _itk_scan(path: Path) -> sitk.Image:
    """The scan as SimpleITK opens it."""
    if path.is_file():
        return sitk.ReadImage(str(path))
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(path))
    if not names:
        raise RuntimeError("SimpleITK finds no series")
    reader.SetFileNames(names)
    return reader.Execute() if len(names) > 1 else sitk.ReadImage(names[0])


# ------------------------------------------------------------------ figures


def all_cases() -> list[Case]:
    """Every case of the three kinds of formats."""
    return [*nifti.cases(), *dicom.cases(), *itk.cases()]


def run_headers(cases: list[Case]) -> Row:
    """Every case in a folder of its own; the row's note says how many are sound."""
    started = time.monotonic()
    row = Row("headers", "headers read as by an independent reader, or refused", len(cases))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            wrong = judged(case, Path(folder))
            if wrong:
                row.faults.append(f"{case.name}: {wrong.replace(folder, '')}")
    kinds = {kind: sum(case.name.startswith(kind) for case in cases)
             for kind in ("NIfTI", "DICOM", "NRRD", "MetaImage")}  # fmt: skip
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    row.note = f"{listed}; {sum(case.sound for case in cases)} sound"
    row.seconds = time.monotonic() - started
    return row


def run(*, full: bool) -> list[Row]:
    """The figure of this part; every case also in a sample, as they take seconds."""
    del full
    return [run_headers(all_cases())]
