"""Single DICOM files: what the header of each image or frame states, and its stored numbers."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset

from dataset.scans.header import first_line
from dataset.scans.itk import quiet

TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "SeriesNumber"),
    *("InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope"),
    *("RescaleIntercept", "ModalityLUTSequence", "SliceThickness", "SpacingBetweenSlices"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "EchoTime"),
    *("EchoNumbers", "TemporalPositionIdentifier", "TriggerTime", "DiffusionBValue"),
    *("DiffusionGradientOrientation", "AcquisitionNumber", "AcquisitionTime", "ImageType"),
    *("FrameReferenceTime", "ContentTime", "FrameOfReferenceUID"),
)
# What may differ between the volumes of one series; the first that tells them apart counts.
VOLUME_KEYS = (
    *("EchoNumbers", "EchoTime", "TemporalPositionIdentifier", "FrameReferenceTime"),
    *("TriggerTime", "DiffusionBValue", "ImageType", "AcquisitionNumber", "AcquisitionTime"),
    "ContentTime",
)
FRAME_VOLUME_KEYS = {  # functional group: attributes, of a frame
    "FrameContentSequence": ("TemporalPositionIndex",),
    "MREchoSequence": ("EffectiveEchoTime",),
    "MRDiffusionSequence": ("DiffusionBValue", "DiffusionDirectionality"),
    "CardiacSynchronizationSequence": ("NominalCardiacTriggerDelayTime",),
    "MRImageFrameTypeSequence": ("FrameType",),
}
NO_SCANS = {  # modality: what it is instead
    "SEG": "a segmentation",
    "RTDOSE": "a dose distribution",
    "RTSTRUCT": "a set of contours",
    "RTPLAN": "a treatment plan",
    "RTRECORD": "a treatment record",
    "REG": "a registration",
    "FID": "a set of fiducials",
    "PR": "a presentation state",
    "KO": "a selection of images",
    "SR": "a report",
    "DOC": "a document",
    "ECG": "an electrocardiogram",
}
NO_SCAN_CLASSES = {  # SOP class: modality, for files that state another one
    "1.2.840.10008.5.1.4.1.1.66.4": "SEG",
    "1.2.840.10008.5.1.4.1.1.481.2": "RTDOSE",
    "1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT",
    "1.2.840.10008.5.1.4.1.1.481.5": "RTPLAN",
}
MAX_FRAMES = 20_000
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class DicomSlice:
    """One image, or one frame of a file with several, as its own header describes it.

    size (columns, rows); spacing (across, down) mm, axes (2, 3) unit vectors along a row and down
    a column, and position (3,) mm of the first pixel, all LPS and None where they are not stated.
    A voxel's value is its stored number * slope + intercept. thickness: of the slice or to the
    next one, mm. differs: values of what may tell volumes of one series apart.
    """

    file: Path
    frame: int
    size: tuple[int, int]
    spacing: tuple[float, float] | None
    axes: np.ndarray | None
    position: np.ndarray | None
    slope: float
    intercept: float
    thickness: float | None
    number: int | None
    differs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The slice's name in messages."""
        return f"{self.file.name} frame {self.frame + 1}" if self.frame else self.file.name


@dataclass(frozen=True)
class DicomFile:
    """One DICOM file: its series, its slices, and the reason if it is not a scan.

    has_image: whether it holds pixels at all. problem: what keeps its numbers from being
    intensities of a scan; empty if nothing does.
    """

    path: Path
    uid: str
    series: str
    series_number: int | None
    modality: str
    frame_of_reference: str
    dtype: str
    inverted: bool
    has_image: bool
    problem: str
    slices: tuple[DicomSlice, ...] = field(repr=False)


def read_dicom(path: Path) -> DicomFile | None:
    """The header of a DICOM file; None for a DICOMDIR.

    Raises ValueError, in one line, for a header that cannot be read.
    """
    try:
        with quiet():
            content = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=TAGS)
        if content.get("SOPClassUID") == DICOMDIR_CLASS:
            return None
        if "SOPClassUID" not in content and "Rows" not in content:
            raise ValueError("it states neither its kind nor an image")
        return _described(path, content)
    except Exception as error:  # pydicom raises many types for damaged files
        raise ValueError(f"{path}: not a readable DICOM file ({first_line(error)})") from error


def _described(path: Path, content: Dataset) -> DicomFile:
    modality = str(content.get("Modality") or "")
    modality = NO_SCAN_CLASSES.get(str(content.get("SOPClassUID")), modality)
    frames = int(content.get("NumberOfFrames") or 1)
    if not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"NumberOfFrames is {frames}")
    problem = _problem(content, modality)
    per_frame = content.get("PerFrameFunctionalGroupsSequence") or ()
    if per_frame and len(per_frame) != frames:
        raise ValueError(f"describes {len(per_frame)} of {frames} frames")
    slices = () if problem else tuple(
        _slice(path, content, frame, per_frame[frame] if per_frame else None, frames)
        for frame in range(frames)
    )  # fmt: skip
    return DicomFile(
        path=path,
        uid=str(content.get("SOPInstanceUID") or path),
        series=str(content.get("SeriesInstanceUID") or ""),
        series_number=_whole(content.get("SeriesNumber")),
        modality=modality,
        frame_of_reference=str(content.get("FrameOfReferenceUID") or ""),
        dtype=_dtype(content),
        inverted=str(content.get("PhotometricInterpretation")) == "MONOCHROME1",
        has_image=bool(content.get("Rows") and content.get("Columns")),
        problem=problem,
        slices=slices,
    )


def _problem(content: Dataset, modality: str) -> str:
    """The reason why a file is not a scan; empty if it is one."""
    if modality in NO_SCANS:
        return f"{NO_SCANS[modality]} ({modality}), not a scan"
    if not content.get("Rows") or not content.get("Columns"):
        return f"holds no image ({modality or 'no modality'})"
    if int(content.get("SamplesPerPixel") or 1) > 1 or "MONOCHROME" not in str(
        content.get("PhotometricInterpretation") or "MONOCHROME2"
    ):
        return f"a colour image ({content.get('PhotometricInterpretation')}), not a scan"
    if content.get("ModalityLUTSequence"):
        return "its intensities need a lookup table (Modality LUT), which is not supported"
    stored, high = content.get("BitsStored"), content.get("HighBit")
    if stored is not None and high is not None and int(high) != int(stored) - 1:
        return f"BitsStored {stored} with HighBit {high} is not supported"
    return ""


def _dtype(content: Dataset) -> str:
    """The stored type, for headers: uint16, int16, ..."""
    sign = "" if content.get("PixelRepresentation") else "u"
    return f"{sign}int{content.get('BitsAllocated') or 16}"


def _slice(
    path: Path, content: Dataset, frame: int, own: Dataset | None, frames: int
) -> DicomSlice:
    """The slice of one frame; own: the functional groups of that frame alone."""
    shared = content.get("SharedFunctionalGroupsSequence") or ()
    groups = [group for group in (own, *shared[:1]) if group is not None]
    find = partial(_stated, content, groups)
    spacing = find("PixelMeasuresSequence", "PixelSpacing", 2)
    if spacing is not None and min(spacing) <= 0:
        spacing = None
    axes = find("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    position = find("PlanePositionSequence", "ImagePositionPatient", 3)
    if frames > 1 and own is None:
        position = None  # one place cannot be that of all frames
    slope = find("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercept = find("PixelValueTransformationSequence", "RescaleIntercept", 1)
    between = find("PixelMeasuresSequence", "SpacingBetweenSlices", 1)
    thick = find("PixelMeasuresSequence", "SliceThickness", 1) or between
    return DicomSlice(
        file=path,
        frame=frame,
        size=(int(content.Columns), int(content.Rows)),
        spacing=None if spacing is None else (spacing[1], spacing[0]),
        axes=None if axes is None else _perpendicular(np.array(axes).reshape(2, 3)),
        position=None if position is None else np.array(position),
        slope=1.0 if slope is None else slope[0],
        intercept=0.0 if intercept is None else intercept[0],
        thickness=thick[0] if thick and thick[0] > 0 else None,
        number=_whole(content.get("InstanceNumber")),
        differs=_differing(content, own),
    )


def _stated(
    content: Dataset, groups: Sequence[Dataset], sequence: str, name: str, count: int
) -> list[float] | None:
    """`count` numbers of an attribute, of a functional group or the file itself; None if absent.

    Raises ValueError for another count and for numbers that are not finite.
    """
    for group in groups:
        inside = group.get(sequence) or ()
        if inside and inside[0].get(name) is not None:
            return _numbers(inside[0], name, count)
    return _numbers(content, name, count)


def _numbers(content: Dataset, name: str, count: int) -> list[float] | None:
    value = content.get(name)
    if value is None or value == "":
        return None
    found = [float(one) for one in (value if isinstance(value, Sequence) else [value])]
    if not found:
        return None
    if len(found) != count or not all(math.isfinite(one) for one in found):
        raise ValueError(f"{name} is {found}; expected {count} finite numbers")
    return found


def _perpendicular(axes: np.ndarray) -> np.ndarray:
    """Two rounded direction vectors (2, 3) as exact unit vectors at right angles."""
    row, column = axes
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(row @ column) > 0.01:
        raise ValueError("ImageOrientationPatient is not two unit vectors at right angles")
    row = row / lengths[0]
    column = column - (column @ row) * row
    return np.stack([row, column / np.linalg.norm(column)])


def _differing(content: Dataset, own: Dataset | None) -> tuple[str, ...]:
    """Values of VOLUME_KEYS, or of FRAME_VOLUME_KEYS for a frame, as text."""
    if own is None:
        return tuple(str(content.get(name)) for name in VOLUME_KEYS)
    found = []
    for sequence, names in FRAME_VOLUME_KEYS.items():
        inside = own.get(sequence) or ()
        found += [str(inside[0].get(name)) if inside else "" for name in names]
    return tuple(found)


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def read_stored(path: Path) -> np.ndarray:
    """The stored numbers of a file's frames (F, rows, columns), before any rescaling.

    Raises ValueError, in one line, for pixel data that cannot be decoded.
    """
    try:
        with quiet():
            content = pydicom.dcmread(path, force=True)
            syntax = content.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
            content.file_meta.TransferSyntaxUID = syntax
            if syntax.is_compressed and syntax != pydicom.uid.RLELossless:
                frames = _decoded(content)
            else:
                frames = content.pixel_array
        frames = frames.reshape(-1, int(content.Rows), int(content.Columns))
        return _masked(frames, content)
    except MemoryError:
        raise
    except Exception as error:  # both libraries raise many types
        reason = first_line(error)
        if isinstance(error, RuntimeError):  # a dump of SimpleITK's
            reason = f"SimpleITK cannot decode {getattr(syntax, 'name', syntax)}"
        raise ValueError(f"{path}: pixel data cannot be read ({reason})") from error


def _decoded(content: Dataset) -> np.ndarray:
    """Pixel data that SimpleITK unpacks, from a copy whose header asks for no rescaling."""
    for name in ("RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence",
                 "PerFrameFunctionalGroupsSequence"):  # fmt: skip
        if name in content:
            delattr(content, name)
    content.PhotometricInterpretation = "MONOCHROME2"  # SimpleITK would invert the other kind
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.dcm"
        content.save_as(copy)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(copy)))


def _masked(frames: np.ndarray, content: Dataset) -> np.ndarray:
    """The numbers without the bits above BitsStored (overlays in old files)."""
    bits = int(content.get("BitsStored") or 16)
    if frames.dtype.kind not in "iu" or bits >= 8 * frames.dtype.itemsize:
        return frames
    if not content.get("PixelRepresentation"):
        return frames & frames.dtype.type((1 << bits) - 1)
    shift = 8 * frames.dtype.itemsize - bits
    return (frames << shift) >> shift
