"""DICOM series that differ from a plain one in one field of one or of all slices."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from tests.stress.scans.cases import Case

SLICES, ROWS, COLUMNS, STEP = 6, 8, 7, 2.5
Change = dict[str, Any]


def slice_of(k: int) -> Dataset:
    """Slice k of a plain CT: int16, 0.8 x 0.9 mm, 2.5 mm apart; its values begin at 10 k."""
    content = Dataset()
    content.file_meta = FileMetaDataset()
    content.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
    content.SOPInstanceUID = content.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
    content.StudyInstanceUID, content.SeriesInstanceUID = "1.2", "1.2.9"
    content.Modality, content.SeriesNumber, content.InstanceNumber = "CT", 1, k + 1
    content.FrameOfReferenceUID = "1.2.8"
    content.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    content.ImagePositionPatient = [-30, -40, 50 + STEP * k]
    content.PixelSpacing, content.SliceThickness = [0.9, 0.8], STEP
    content.Rows, content.Columns, content.SamplesPerPixel = ROWS, COLUMNS, 1
    content.BitsAllocated, content.BitsStored, content.HighBit = 16, 16, 15
    content.PixelRepresentation, content.PhotometricInterpretation = 1, "MONOCHROME2"
    content.RescaleSlope, content.RescaleIntercept = 1, -100
    content.PatientName, content.PatientID = "Nobody", "0"
    values = 10 * k + np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    content.PixelData = values.astype("<i2").tobytes()
    return content


def save(content: Dataset, path: Path) -> None:
    """Write one file as it is, without any check."""
    content.file_meta.MediaStorageSOPClassUID = content.SOPClassUID
    content.save_as(path, enforce_file_format=True)


def series(
    folder: Path,
    *,
    all_slices: Change | None = None,
    one: dict[int, Change] | None = None,
    each: Callable[[int, Dataset], None] | None = None,
    count: int = SLICES,
    left_out: Sequence[int] = (),
    name: Callable[[int], str] = "{:02d}.dcm".format,
) -> Path:
    """A series of plain slices with attributes changed; None takes an attribute away."""
    for k in range(count):
        if k in left_out:
            continue
        content = slice_of(k)
        for attribute, value in ((all_slices or {}) | (one or {}).get(k, {})).items():
            if value is None:
                delattr(content, attribute)
            else:
                setattr(content, attribute, value)
        if each is not None:
            each(k, content)
        path = folder / name(k)
        path.parent.mkdir(exist_ok=True)
        save(content, path)
    return folder


def _turned(degrees: float, axis: str) -> list[float]:
    """Row and column directions turned about the patient's x or z axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [1, 0, 0, 0, c, s] if axis == "x" else [c, s, 0, -s, c, 0]


def _placed(axes: Sequence[float], digits: int | None = None) -> Callable[[int, Dataset], None]:
    """Slices with the given directions, placed along their normal; rounded to so many digits."""
    normal = np.cross(axes[:3], axes[3:])

    def place(k: int, content: Dataset) -> None:
        position = np.array([-30, -40, 50]) + STEP * k * normal
        rounded = axes if digits is None else [round(v, digits) for v in axes]
        content.ImageOrientationPatient = [float(v) for v in rounded]
        content.ImagePositionPatient = [
            round(float(v), 10 if digits is None else digits) for v in position
        ]

    return place


def _at(places: Callable[[int], float]) -> Callable[[int, Dataset], None]:
    """Slices at other heights."""

    def place(k: int, content: Dataset) -> None:
        content.ImagePositionPatient = [-30, -40, round(places(k), 10)]

    return place


def _stored(kind: str, bits: int, **more: Any) -> Callable[[int, Dataset], None]:
    """The same values stored in another type."""

    def store(k: int, content: Dataset) -> None:
        values = np.frombuffer(content.PixelData, "<i2")
        allocated = 8 * np.dtype(kind).itemsize
        content.BitsAllocated, content.BitsStored, content.HighBit = allocated, bits, bits - 1
        content.PixelRepresentation = int(np.dtype(kind).kind == "i")
        content.PixelData = values.astype(kind).tobytes()
        for attribute, value in more.items():
            setattr(content, attribute, value)

    return store


def _overlaid(k: int, content: Dataset) -> None:
    """12 of 16 bits, the others holding an overlay as old scanners stored it."""
    values = np.frombuffer(content.PixelData, "<i2").astype("<u2") | 0x8000
    content.BitsStored, content.HighBit, content.PixelRepresentation = 12, 11, 0
    content.PixelData = values.tobytes()


def _in_syntax(syntax: str) -> Callable[[Path], Path]:
    """A maker of a plain series in another transfer syntax."""

    def make(folder: Path) -> Path:
        series(folder)
        for path in folder.iterdir():
            content = pydicom.dcmread(path)
            if syntax == uid.RLELossless:
                content.compress(syntax)
            elif syntax == uid.ExplicitVRBigEndian:
                content.PixelData = np.frombuffer(content.PixelData, "<i2").astype(">i2").tobytes()
                content["PixelData"].VR = "OW"
            content.file_meta.TransferSyntaxUID = syntax
            implicit = syntax == uid.ImplicitVRLittleEndian
            big = syntax == uid.ExplicitVRBigEndian
            pydicom.dcmwrite(path, content, implicit_vr=implicit, little_endian=not big,
                             force_encoding=True)  # fmt: skip
        return folder

    return make


def _compressed(compressor: str) -> Callable[[Path], Path]:
    """A maker of a series that SimpleITK compressed without loss."""

    def make(folder: Path) -> Path:
        series(folder)
        for path in sorted(folder.iterdir()):
            image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkInt16)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.UseCompressionOn()
            writer.SetCompressor(compressor)
            writer.SetFileName(str(path))
            writer.Execute(image)
            content = pydicom.dcmread(path)
            content.RescaleSlope, content.RescaleIntercept = 2, -7
            content.SeriesInstanceUID = "1.2.9"
            save(content, path)
        return folder

    return make


def _without_preamble(folder: Path) -> Path:
    series(folder)
    for path in folder.iterdir():
        content = pydicom.dcmread(path)
        del content.file_meta
        content.save_as(path, enforce_file_format=False, implicit_vr=True, little_endian=True)
    return folder


def multiframe(
    folder: Path,
    *,
    volumes: int = 1,
    change: Callable[[list[Dataset]], None] = lambda frames: None,
    described: bool = True,
) -> Path:
    """An enhanced MR file of six places and so many diffusion weightings."""
    content = slice_of(0)
    content.SOPClassUID, content.Modality = uid.EnhancedMRImageStorage, "MR"
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
                 "SliceThickness", "RescaleSlope", "RescaleIntercept"):  # fmt: skip
        delattr(content, name)
    content.NumberOfFrames = SLICES * volumes
    values = np.arange(SLICES * volumes * ROWS * COLUMNS) % 3000
    content.PixelData = values.astype("<i2").tobytes()
    frames = [_frame(n % SLICES, n // SLICES) for n in range(SLICES * volumes)]
    change(frames)
    if described:
        content.PerFrameFunctionalGroupsSequence = frames
        content.SharedFunctionalGroupsSequence = [Dataset()]
    save(content, folder / "one.dcm")
    return folder


def _frame(place: int, weighting: int) -> Dataset:
    frame = Dataset()
    for sequence, attribute, value in (
        ("PlanePositionSequence", "ImagePositionPatient", [-30, -40, 50 + STEP * place]),
        ("PlaneOrientationSequence", "ImageOrientationPatient", [1, 0, 0, 0, 1, 0]),
        ("PixelMeasuresSequence", "PixelSpacing", [0.9, 0.8]),
        ("PixelValueTransformationSequence", "RescaleSlope", 0.5 + weighting),
        ("MRDiffusionSequence", "DiffusionBValue", 100.0 * weighting),
    ):
        inside = Dataset()
        setattr(inside, attribute, value)
        setattr(frame, sequence, [inside])
    frame.PixelValueTransformationSequence[0].RescaleIntercept = 1
    return frame


def _frame_moved(frames: list[Dataset]) -> None:
    frames[2].PlanePositionSequence[0].ImagePositionPatient = [-25, -40, 55]


def _frame_turned(frames: list[Dataset]) -> None:
    frames[3].PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, -1, 0]


def _two_series(folder: Path) -> Path:
    series(folder)
    series(folder, all_slices={"SeriesInstanceUID": "1.2.10", "SeriesNumber": 2},
           each=lambda k, content: setattr(content, "SOPInstanceUID", f"1.2.4.{k + 1}"),
           name="b{}.dcm".format)  # fmt: skip
    return folder


def _times(k_of: Callable[[int], int], **more: Callable[[int], Any]) -> Callable:
    """12 files at 6 places: file n lies at place k_of(n)."""

    def place(n: int, content: Dataset) -> None:
        content.ImagePositionPatient = [-30, -40, 50 + STEP * k_of(n)]
        for attribute, value in more.items():
            setattr(content, attribute, value(n))

    return place


def _copied(folder: Path) -> Path:
    series(folder)
    shutil.copy(folder / "02.dcm", folder / "02 copy.dcm")
    return folder


def _cut(folder: Path) -> Path:
    series(folder)
    data = (folder / "03.dcm").read_bytes()
    (folder / "03.dcm").write_bytes(data[:-60])
    return folder


def _damaged(folder: Path, content: bytes) -> Path:
    series(folder)
    (folder / "05.dcm").write_bytes(content)
    return folder


def _with_others(folder: Path) -> Path:
    series(folder)
    (folder / "README.txt").write_text("not a scan")
    (folder / ".hidden.dcm").write_bytes(b"nothing")
    return folder


def _plain(**how: Any) -> Callable[[Path], Path]:
    return lambda folder: series(folder, **how)


def sound_cases() -> dict[str, Callable[[Path], Path]]:
    """Makers of series that must be read."""
    axial = [1, 0, 0, 0, 1, 0]
    return {
        "plain": _plain(),
        "turned in plane": _plain(each=_placed(_turned(20, "z"))),
        "coronal": _plain(all_slices={}, each=_placed([1, 0, 0, 0, 0, -1])),
        "sagittal": _plain(each=_placed([0, 1, 0, 0, 0, -1])),
        "oblique": _plain(each=_placed(_turned(30, "x"))),
        **{f"headers rounded to {digits} digits": _plain(each=_placed(_turned(21, "x"), digits),
           count=20) for digits in (6, 4, 3)},
        "positions rounded to 0.1 mm": _plain(
            each=_at(lambda k: round(50 + 1.27 * k, 1)), count=25),
        "steps of a third": _plain(each=_at(lambda k: round(50 + k / 3, 2)), count=12),
        "pixel sizes in other digits": _plain(one={2: {"PixelSpacing": [0.9003, 0.7998]}}),
        "orientation in other digits": _plain(one={2: {
            "ImageOrientationPatient": [1, 0.0004, 0, -0.0004, 1, 0]}}),
        "a slice 0.04 mm off": _plain(one={2: {"ImagePositionPatient": [-30, -40, 55.04]}}),
        "highest slice first": _plain(each=_at(lambda k: 50 - STEP * k)),
        "names in another order": _plain(name=lambda k: f"{(k * 5) % 7}.dcm"),
        "no instance numbers": _plain(all_slices={"InstanceNumber": None}),
        "no suffixes": _plain(name="IM{}".format),
        "in folders": _plain(name="part{0}/{0}.dcm".format),
        "with other files": _with_others,
        "two slices": _plain(count=2),
        "one slice": _plain(count=1),
        "MR without rescale": _plain(all_slices={
            "SOPClassUID": uid.MRImageStorage, "Modality": "MR", "RescaleSlope": None,
            "RescaleIntercept": None}),
        "MR with rescale": _plain(all_slices={
            "SOPClassUID": uid.MRImageStorage, "Modality": "MR", "RescaleSlope": 2.5}),
        "PET with a slope a slice": _plain(each=lambda k, c: setattr(
            c, "RescaleSlope", round(0.1 + k / 7, 8)), all_slices={
            "SOPClassUID": uid.PositronEmissionTomographyImageStorage, "Modality": "PT"}),
        "slope 1, then 0.5": _plain(each=lambda k, c: setattr(c, "RescaleSlope", 0.5 if k else 1)),
        "intercept 0, then -1024, uint16": _plain(each=lambda k, c: (
            _stored("<u2", 16)(k, c), setattr(c, "RescaleIntercept", -1024 if k else 0))),
        "uint16 above 32767": _plain(each=lambda k, c: (
            _stored("<u2", 16)(k, c), setattr(c, "RescaleIntercept", 40000))),
        "8 bits": _plain(each=_stored("u1", 8, RescaleIntercept=0)),
        "12 bits": _plain(each=_stored("<u2", 12)),
        "32 bits": _plain(each=_stored("<i4", 32)),
        "overlay in high bits": _plain(each=_overlaid),
        "implicit VR": _in_syntax(uid.ImplicitVRLittleEndian),
        "big-endian": _in_syntax(uid.ExplicitVRBigEndian),
        "deflated": _in_syntax(uid.DeflatedExplicitVRLittleEndian),
        "RLE": _in_syntax(uid.RLELossless),
        "JPEG 2000": _compressed("JPEG2000"),
        "JPEG-LS": _compressed("JPEGLS"),
        "lossless JPEG": _compressed("JPEG"),
        "no preamble": _without_preamble,
        "enhanced multi-frame": multiframe,
        "no thickness": _plain(all_slices={"SliceThickness": None}),
        "wrong thickness": _plain(all_slices={"SliceThickness": 5}),
        "axial, named so": _plain(all_slices={"ImageOrientationPatient": axial}),
    }  # fmt: skip


def changed_cases() -> dict[str, Callable[[Path], Path]]:
    """Makers of series with a field that changes what a voxel means or where it lies."""
    two = {"count": 12}
    return {
        "third slice with larger pixels": _plain(one={2: {"PixelSpacing": [0.9, 0.85]}}),
        "middle slice 5 mm aside": _plain(one={3: {"ImagePositionPatient": [-25, -40, 57.5]}}),
        "middle slice 0.2 mm aside": _plain(one={3: {"ImagePositionPatient": [-29.8, -40, 57.5]}}),
        "last slice flipped": _plain(one={5: {"ImageOrientationPatient": [1, 0, 0, 0, -1, 0]}}),
        "a slice turned by 1 degree": _plain(one={2: {"ImageOrientationPatient": _turned(1, "z")}}),
        "two scouts": _plain(count=2, one={
            0: {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
            1: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}}),
        "three orientations": _plain(each=lambda k, c: setattr(
            c, "ImageOrientationPatient", [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1],
                                           [1, 0, 0, 0, 0, -1]][k % 3])),
        "all at one place": _plain(each=_at(lambda k: 50)),
        "growing gaps": _plain(each=_at(lambda k: 50 + 2 * k + 0.1 * k * k)),
        "uneven gaps": _plain(each=_at(lambda k: 50 + 2 * k + 0.4 * (k % 2))),
        "a slice missing": _plain(left_out=[3]),
        "two slices missing": _plain(left_out=[2, 4], count=9),
        "a slice doubled": _plain(each=_at(lambda k: 50 + STEP * min(k, 4))),
        "a file copied": _copied,
        "no position": _plain(all_slices={"ImagePositionPatient": None}),
        "one without position": _plain(one={3: {"ImagePositionPatient": None}}),
        "no orientation": _plain(all_slices={"ImageOrientationPatient": None}),
        "one without orientation": _plain(one={3: {"ImageOrientationPatient": None}}),
        "no pixel spacing": _plain(all_slices={"PixelSpacing": None}),
        "one without pixel spacing": _plain(one={3: {"PixelSpacing": None}}),
        "pixel spacing 0": _plain(all_slices={"PixelSpacing": [0, 0.8]}),
        "no place at all": _plain(all_slices={"PixelSpacing": None, "ImagePositionPatient": None,
                                              "ImageOrientationPatient": None}),
        "one slice without thickness": _plain(count=1, all_slices={"SliceThickness": None}),
        "one slice with more columns": _plain(one={2: {"Columns": 8, "Rows": 7}}),
        "MONOCHROME1": _plain(all_slices={"PhotometricInterpretation": "MONOCHROME1"}),
        "MONOCHROME1, 12 bits": _plain(all_slices={"PhotometricInterpretation": "MONOCHROME1"},
                                       each=_stored("<u2", 12)),
        "palette": _plain(all_slices={"PhotometricInterpretation": "PALETTE COLOR"}),
        "segmentation": _plain(all_slices={"Modality": "SEG"}),
        "segmentation by its class": _plain(all_slices={"SOPClassUID": uid.SegmentationStorage}),
        "dose": _plain(all_slices={"Modality": "RTDOSE"}),
        "contours": _plain(all_slices={"Modality": "RTSTRUCT"}),
        "tilt of 18.5 degrees": _plain(all_slices={"ImageOrientationPatient": _turned(18.5, "x")}),
        "tilt of 1 degree": _plain(all_slices={"ImageOrientationPatient": _turned(1, "x")},
                                   count=20),
        "orientation of length 0.9": _plain(all_slices={
            "ImageOrientationPatient": [0.9, 0, 0, 0, 0.9, 0]}),
        "axes at 60 degrees": _plain(all_slices={
            "ImageOrientationPatient": [1, 0, 0, 0.5, 0.8660254, 0]}),
        "position NaN": _plain(one={2: {"ImagePositionPatient": ["nan", -40, 55]}}),
        "two numbers of position": _plain(one={2: {"ImagePositionPatient": [-30, -40]}}),
        "cut": _cut,
        "high bit 13": _plain(all_slices={"BitsStored": 12, "HighBit": 13}),
        "three samples": _plain(all_slices={"SamplesPerPixel": 3,
                                            "PhotometricInterpretation": "RGB"}),
        "wrong number of frames": _plain(all_slices={"NumberOfFrames": 3}),
        "two frames of reference": _plain(one={5: {"FrameOfReferenceUID": "1.2.99"}}),
        "last slice damaged": lambda folder: _damaged(folder, bytes(128) + b"DICM" + bytes(300)),
        "last slice empty": lambda folder: _damaged(folder, b""),
        "two series": _two_series,
        "two echoes": _plain(**two, each=_times(lambda n: n % 6, EchoTime=lambda n: 5 + n // 6)),
        "two times without a key": _plain(**two, each=_times(lambda n: n // 2)),
        "one place twice, another thrice": _plain(count=7, each=_times(lambda n: min(n, 4))),
        "multi-frame, four weightings": lambda folder: multiframe(folder, volumes=4),
        "multi-frame, a frame aside": lambda folder: multiframe(folder, change=_frame_moved),
        "multi-frame, a frame flipped": lambda folder: multiframe(folder, change=_frame_turned),
        "multi-frame, undescribed": lambda folder: multiframe(folder, described=False),
        "metadata of a few frames": lambda folder: multiframe(
            folder, change=lambda frames: frames.pop()),
    }  # fmt: skip


def cases() -> list[Case]:
    """Sound and changed DICOM series."""
    return [
        *(Case(f"DICOM {name}", True, make) for name, make in sound_cases().items()),
        *(Case(f"DICOM {name}", False, make) for name, make in changed_cases().items()),
    ]
