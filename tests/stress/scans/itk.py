"""NRRD and MetaImage files that differ from a plain one in one field of the header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.stress.scans.cases import Case

NRRD = {
    "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "7 8 9",
    "space directions": "(0.8,0,0) (0,0.9,0) (0,0,2.5)", "kinds": "domain domain domain",
    "endian": "little", "encoding": "raw", "space origin": "(1,2,3)",
}  # fmt: skip
META = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "1 2 3",
    "CenterOfRotation": "0 0 0", "AnatomicalOrientation": "RAI", "ElementSpacing": "0.8 0.9 2.5",
    "DimSize": "7 8 9", "ElementType": "MET_SHORT",
}  # fmt: skip
VOXELS = (np.arange(7 * 8 * 9) % 120).astype("<i2")


def nrrd(path: Path, changes: dict[str, str | None], copies: int = 1) -> Path:
    """An NRRD file; a change to None leaves the field out."""
    fields = {name: value for name, value in (NRRD | changes).items() if value is not None}
    text = "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in fields.items())
    voxels = VOXELS.tobytes() * copies
    if path.suffix == ".nhdr":
        text += "data file: voxels.raw\n"
        (path.parent / "voxels.raw").write_bytes(voxels)
        voxels = b""
    path.write_bytes(text.encode() + b"\n" + voxels)
    return path


def meta(path: Path, changes: dict[str, str | None], copies: int = 1) -> Path:
    """A MetaImage file; a change to None leaves the field out."""
    fields = {name: value for name, value in (META | changes).items() if value is not None}
    place = "LOCAL" if path.suffix == ".mha" else "voxels.raw"
    text = "".join(f"{name} = {value}\n" for name, value in fields.items())
    text += f"ElementDataFile = {place}\n"
    voxels = VOXELS.tobytes() * copies
    if path.suffix == ".mhd":
        (path.parent / "voxels.raw").write_bytes(voxels)
        voxels = b""
    path.write_bytes(text.encode() + voxels)
    return path


def cases() -> list[Case]:
    """Sound and changed NRRD and MetaImage files."""
    nowhere = {"space": None, "space directions": None, "space origin": None}
    lines: list[tuple[str, bool, str, dict[str, str | None], int]] = [
        ("plain", True, "a.nrrd", {}, 1),
        ("voxels in a file of their own", True, "a.nhdr", {}, 1),
        ("space RAS", True, "a.nrrd", {"space": "right-anterior-superior"}, 1),
        ("space LAS", True, "a.nrrd", {"space": "left-anterior-superior"}, 1),
        ("turned", True, "a.nrrd", {"space directions": "(0,0.9,0) (0.8,0,0) (0,0,-2.5)"}, 1),
        ("scanner-xyz", False, "a.nrrd", {"space": "scanner-xyz"}, 1),
        ("no space", False, "a.nrrd", nowhere, 1),
        ("spacings alone", False, "a.nrrd", nowhere | {"spacings": "0.8 0.9 2.5"}, 1),
        ("metres", False, "a.nrrd", {"space units": '"m" "m" "m"'}, 1),
        ("parsecs", False, "a.nrrd", {"space units": '"pc" "pc" "pc"'}, 1),
        ("sheared", False, "a.nrrd", {"space directions": "(0.8,0,0) (0,0.9,0) (0,1,2.5)"}, 1),
        ("no origin", False, "a.nrrd", {"space origin": None}, 1),
        ("two volumes", False, "a.nrrd", {
            "dimension": "4", "sizes": "7 8 9 2", "kinds": "domain domain domain list",
            "space directions": "(0.8,0,0) (0,0.9,0) (0,0,2.5) none"}, 2),
        ("direction NaN", False, "a.nrrd",
         {"space directions": "(nan,nan,nan) (0,0.9,0) (0,0,2.5)"}, 1),
        ("plain", True, "a.mha", {}, 1),
        ("voxels in a file of their own", True, "a.mhd", {}, 1),
        ("turned", True, "a.mha", {"TransformMatrix": "0 1 0 1 0 0 0 0 -1"}, 1),
        ("other names", True, "a.mha", {"Offset": None, "Position": "1 2 3"}, 1),
        ("no spacing", False, "a.mha", {"ElementSpacing": None}, 1),
        ("no matrix", False, "a.mha", {"TransformMatrix": None}, 1),
        ("sheared", False, "a.mha", {"TransformMatrix": "1 0 0 0 1 0 0 .3 1"}, 1),
        ("micrometres", False, "a.mha", {"DistanceUnits": "um"}, 1),
        ("intensity slope", False, "a.mha", {"ElementToIntensityFunctionSlope": "2"}, 1),
        ("header size", False, "a.mha", {"HeaderSize": "10"}, 1),
        ("spacing 0", False, "a.mha", {"ElementSpacing": "0.8 0 2.5"}, 1),
        ("spacing negative", False, "a.mha", {"ElementSpacing": "0.8 -0.9 2.5"}, 1),
        ("two channels", False, "a.mha", {"ElementNumberOfChannels": "2"}, 2),
    ]  # fmt: skip
    return [Case(f"{_kind(name)} {what}", sound, _maker(name, changes, copies))
            for what, sound, name, changes, copies in lines]  # fmt: skip


def _kind(name: str) -> str:
    return "NRRD" if name.endswith(("nrrd", "nhdr")) else "MetaImage"


def _maker(name: str, changes: dict[str, str | None], copies: int) -> Any:
    write = nrrd if _kind(name) == "NRRD" else meta
    return lambda folder: write(folder / name, changes, copies)
