"""NRRD and MetaImage files, read by SimpleITK; fields it ignores are read from the text."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dataset.scans.header import (
    MAX_DEFLATE_RATIO,
    Scan,
    ScanHeader,
    as_volume,
    check_header,
    narrow,
)

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
HEADER_TEXT_BYTES = 2**16
ANATOMICAL_SPACES = {  # of NRRD; SimpleITK turns all of them to LPS
    *("right-anterior-superior", "left-anterior-superior", "left-posterior-superior"),
    *("ras", "las", "lps"),
}
MM_PER_UNIT = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "um": 0.001, "µm": 0.001, "?": 1.0, "": 1.0}

sitk.ProcessObject.SetGlobalWarningDisplay(False)


@dataclass(frozen=True)
class ItkFile:
    """An NRRD or MetaImage file whose header was read."""

    header: ScanHeader

    def voxels(self, channel: int) -> np.ndarray:
        """(I, J, K) voxels of one channel; vector components count before repeats."""
        path = self.header.path
        try:
            with quiet():
                image = sitk.ReadImage(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: SimpleITK cannot read its voxels{_reason(error)}") from None
        return _voxels(path, image, self.header.shape, channel)


def open_itk(path: Path) -> ItkFile:
    """An NRRD or MetaImage file with its header read; ValueError if it cannot be a volume."""
    is_nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    text = _header_text(path)
    unit, facts, remarks = (_nrrd_facts if is_nrrd else _metaimage_facts)(path, text)
    detached = voxel_file(path)
    if detached is not None and not detached.is_file():
        raise ValueError(f"{path}: its voxels should lie in {detached.name}, which does not exist")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path}: SimpleITK cannot read its header{_reason(error)}") from None
    shape, channels = as_volume(path, tuple(reader.GetSize()))
    channels *= reader.GetNumberOfComponents()
    dtype = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    affine = _affine(reader)
    affine[:3] *= unit
    header = ScanHeader(path, "nrrd", shape, channels, dtype, affine, remarks=remarks, **facts)
    claimed = math.prod(shape) * channels  # at least a byte a voxel
    available = (detached or path).stat().st_size * MAX_DEFLATE_RATIO
    return ItkFile(check_header(header, claimed=claimed, available=available))


def scan_of_image(path: Path, image: sitk.Image, channel: int | None) -> Scan:
    """A SimpleITK image as a scan that is called `path`, with its errors; see read_scan."""
    shape, repeats = as_volume(path, image.GetSize())
    components = image.GetNumberOfComponentsPerPixel()
    dtype = image.GetPixelIDTypeAsString()
    header = ScanHeader(path, "array", shape, repeats * components, dtype, _affine(image))
    header = check_header(header, claimed=None, available=0)
    return Scan(_voxels(path, image, shape, header.channel(channel)), header)


def _voxels(path: Path, image: sitk.Image, shape: tuple[int, ...], channel: int) -> np.ndarray:
    i, j, k = shape
    components = image.GetNumberOfComponentsPerPixel()
    stored = sitk.GetArrayViewFromImage(image).reshape(-1, k, j, i, components)
    repeat, component = divmod(channel, components)
    return as_stored(path, stored[repeat, ..., component])


def voxel_file(path: Path) -> Path | None:
    """The file with a header's voxels; None if they follow the header or are in several files."""
    text = _header_text(path)
    named = text.get("data file", text.get("datafile", text.get("elementdatafile", "LOCAL")))
    if named.upper() == "LOCAL" or re.search(r"%|^LIST", named):
        return None
    return path.parent / named


def _affine(reader: sitk.ImageFileReader | sitk.Image) -> np.ndarray:
    """(4, 4) index -> RAS mm from an ITK header, which is in LPS."""
    dims = reader.GetDimension()
    direction = np.array(reader.GetDirection(), dtype=np.float64).reshape(dims, dims)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    return RAS_FROM_LPS @ affine


def _header_text(path: Path) -> dict[str, str]:
    """Fields of an NRRD or MetaImage header, with keys in lower case."""
    with path.open("rb") as stream:
        block = stream.read(HEADER_TEXT_BYTES).decode("latin-1").replace("\r\n", "\n")
    fields: dict[str, str] = {}
    if block.startswith("NRRD"):
        for line in block.split("\n\n", 1)[0].split("\n")[1:]:
            key, colon, value = line.partition(": ")
            if colon and not key.startswith("#"):
                fields[key.strip().lower()] = value.strip()
        return fields
    for line in block.split("\n"):
        key, equals, value = line.partition("=")
        if not equals:
            continue
        fields[key.strip().lower()] = value.strip()
        if key.strip().lower() == "elementdatafile":
            break  # it comes last; voxels may follow
    return fields


Facts = tuple[float, dict[str, bool], tuple[str, ...]]


def _nrrd_facts(path: Path, text: dict[str, str]) -> Facts:
    """From an NRRD header's text: (mm per unit, whether oriented and sized, remarks)."""
    units = set(re.findall(r'"([^"]*)"', text.get("space units", ""))) - {""}
    unit, remarks = _unit_of(path, "space units", units)
    space = text.get("space", "").lower().removesuffix("-time").removesuffix("t")
    facts = {
        "oriented": space in ANATOMICAL_SPACES,
        "sized": "space directions" in text or "spacings" in text,
    }
    return unit, facts, remarks


def _metaimage_facts(path: Path, text: dict[str, str]) -> Facts:
    """From a MetaImage header's text: (mm per unit, whether oriented and sized, remarks)."""
    for key, plain in {"slope": 1.0, "offset": 0.0}.items():
        value = text.get(f"elementtointensityfunction{key}")
        if value is not None and _number(value) != plain:
            raise ValueError(f"{path}: an intensity {key} of {value:.20} is not supported")
    is_local = text.get("elementdatafile", "LOCAL").upper() == "LOCAL"
    if is_local and _number(text.get("headersize", "0")) not in (0, -1):
        raise ValueError(f"{path}: HeaderSize belongs to voxels in a file of their own")
    named = {text["distanceunits"].lower()} if "distanceunits" in text else set()
    unit, remarks = _unit_of(path, "DistanceUnits", named)
    turns = {"transformmatrix", "rotation", "orientation"}
    facts = {
        "oriented": bool(turns & set(text)),
        "sized": bool({"elementspacing", "elementsize"} & set(text)),
    }
    return unit, facts, remarks


def _unit_of(path: Path, field: str, units: set[str]) -> tuple[float, tuple[str, ...]]:
    """(mm per unit, remarks) for the unit of length that a header names; mm by default."""
    factors = {MM_PER_UNIT.get(unit.removeprefix("met_distance_units_")) for unit in units}
    if None in factors or len(factors) > 1:
        raise ValueError(f"{path}: {field} {', '.join(sorted(units)):.60} not supported; use mm")
    factor = factors.pop() if factors else 1.0
    if factor == 1:
        return factor, ()
    return factor, (f"{field} is {units.pop()}: scaled to mm, which ITK-based viewers do not do",)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def as_stored(path: Path, stored: np.ndarray) -> np.ndarray:
    """ITK's (K, J, I) as (I, J, K), copied out of ITK's memory and narrowed."""
    if stored.dtype.kind in "iu" and stored.min() >= -32768 and stored.max() <= 32767:
        stored = stored.astype(np.uint8 if stored.dtype == np.uint8 else np.int16)
    return np.array(narrow(path, stored)).transpose(2, 1, 0)


def _reason(error: Exception) -> str:
    """Last line of an ITK error in brackets, without object addresses and paths."""
    line = (str(error).strip().splitlines() or [""])[-1]
    line = re.sub(r"^.*ITK ERROR: |\w+\(0x[0-9a-f]+\): |\(0x[0-9a-f]+\)", "", line)
    line = re.sub(r"/\S+/", "", line).strip()[:120]
    return f" ({line})" if line else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that silences libraries which print to stderr themselves, such as GDCM."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
