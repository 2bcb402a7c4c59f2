"""NIfTI files that differ from a plain one in one field of the header."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tests.stress.scans.cases import Case

SHAPE = (7, 8, 9)


def oblique(degrees: float = 20.0) -> np.ndarray:
    """(4, 4) index -> RAS mm of a scan turned about the patient's long axis."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0],
                     [0, 0, 1]])  # fmt: skip
    return nib.affines.from_matvec(turn @ np.diag([-0.8, -0.9, 2.5]), (40, 50, -60))


PLAIN = nib.affines.from_matvec(np.diag([-0.8, -0.9, 2.5]), (40, 50, -60))


def moved(x: float = 0, shear: float = 0) -> np.ndarray:
    """The plain affine moved by x mm along x, its slices sheared along y by a share of the step."""
    other = PLAIN.copy()
    other[0, 3] += x
    other[1, 2] += 2.5 * shear
    return other


def write(
    path: Path,
    *,
    sform: np.ndarray = PLAIN,
    qform: np.ndarray | None = None,
    codes: tuple[int, int] = (1, 1),
    dtype: str = "<i2",
    shape: tuple[int, ...] = SHAPE,
    units: int = 2,
    slope: tuple[float, float] = (1, 0),
    version: int = 1,
    packed: bool | None = None,
    cut: int = 0,
    fill: float | None = None,
    fields: dict[str, Any] | None = None,
    pixdim: dict[int, float] | None = None,
) -> Path:
    """A NIfTI file of values 0, 1, 2, ... with every field of the header under control."""
    kind = np.dtype(dtype)
    header = (nib.Nifti2Header if version == 2 else nib.Nifti1Header)(endianness=
              ">" if kind.byteorder == ">" else "<")  # fmt: skip
    header.set_data_dtype(kind.newbyteorder("="))
    header.set_data_shape(shape)
    header.set_qform(sform if qform is None else qform, 1, strip_shears=True)
    header.set_sform(sform, 1)
    header["qform_code"], header["sform_code"] = codes[1], codes[0]
    header["xyzt_units"], header["vox_offset"] = units, header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = slope
    for place, value in (pixdim or {}).items():
        header["pixdim"][place] = value
    for name, value in (fields or {}).items():
        header[name] = value
    values = np.arange(np.prod(shape)) % 120
    array = values.astype(kind)
    if fill is not None:
        array[5] = fill
    data = header.binaryblock + bytes(4) + array.tobytes()
    data = data[: len(data) - cut]
    gzipped = path.name.endswith(".gz") if packed is None else packed
    path.write_bytes(gzip.compress(data, 1) if gzipped else data)
    return path


def cases() -> list[Case]:
    """Sound and changed NIfTI files."""
    metres = nib.affines.from_matvec(PLAIN[:3, :3] / 1000, PLAIN[:3, 3] / 1000)
    micrometres = nib.affines.from_matvec(PLAIN[:3, :3] * 1000, PLAIN[:3, 3] * 1000)
    right = np.diag([1.0, 1, -1, 1]) @ PLAIN
    turned = PLAIN[:, [2, 0, 1, 3]]
    sound = {
        "plain": {}, "turned in plane": {"sform": oblique()}, "axes in another order":
        {"sform": turned}, "left-handed": {"sform": right}, "sform alone": {"codes": (1, 0)},
        "qform alone": {"codes": (0, 1)}, "aligned codes": {"codes": (2, 2)}, "MNI codes":
        {"codes": (4, 4)}, "codes 2 and 1": {"codes": (2, 1)}, "unknown unit": {"units": 0},
        "mm and seconds": {"units": 10}, "metres": {"sform": metres, "units": 1},
        "micrometres": {"sform": micrometres, "units": 3}, "big-endian": {"dtype": ">i2"},
        "NIfTI-2": {"version": 2}, "uint8": {"dtype": "u1"}, "int8": {"dtype": "i1"}, "uint16":
        {"dtype": "<u2"}, "int32": {"dtype": "<i4"}, "float32": {"dtype": "<f4"}, "float64":
        {"dtype": "<f8"}, "slope and intercept": {"slope": (2, -1024)},
        "slope 0": {"slope": (0, 0)},
        "fractional slope": {"slope": (0.25, 3)}, "one volume in 4D": {"shape": (*SHAPE, 1)},
        "a time step": {"pixdim": {4: 2.0}}, "slice code": {"fields": {"slice_code": 3}},
        "display range": {"fields": {"cal_max": 50}},
    }  # fmt: skip
    nan = float("nan")
    changed = {
        **{f"sform and qform 30 mm apart, codes {codes}": {"qform": moved(30), "codes": codes}
           for codes in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 0), (0, 1))},
        "no codes": {"codes": (0, 0)}, "qform turned by 20 degrees": {"qform": oblique()},
        "pixdim 0, sform": {"pixdim": {2: 0}},
        "pixdim 0, qform": {"pixdim": {2: 0}, "codes": (0, 1)},
        "pixdim 0, no codes": {"pixdim": {2: 0}, "codes": (0, 0)},
        "pixdim negative, sform": {"pixdim": {2: -0.9}}, "pixdim negative, qform":
        {"pixdim": {2: -0.9}, "codes": (0, 1)}, "pixdim negative, no codes":
        {"pixdim": {2: -0.9}, "codes": (0, 0)}, "pixdim NaN, sform": {"pixdim": {3: nan}},
        "pixdim NaN, qform": {"pixdim": {3: nan}, "codes": (0, 1)},
        "pixdim twice the sform's": {"pixdim": {3: 5.0}, "codes": (1, 0)},
        "qfac -3": {"pixdim": {0: -3}, "codes": (0, 1)}, "qfac 0": {"pixdim": {0: 0}},
        "shear of 0.01": {"sform": moved(shear=0.01)}, "shear of 0.3": {"sform": moved(shear=0.3)},
        "shear, sform alone": {"sform": moved(shear=0.3), "codes": (1, 0)},
        "shear of 0.0001, sform alone": {"sform": moved(shear=1e-4), "codes": (1, 0)},
        "sform NaN": {"fields": {"srow_x": nan}}, "sform 0": {"fields": {"srow_z": 0}},
        "quaternion of length 3": {"fields": {"quatern_b": 3.0}}, "quaternion of length 3, qform":
        {"fields": {"quatern_b": 3.0}, "codes": (0, 1)}, "code 99": {"codes": (99, 1)},
        "code -1": {"codes": (-1, 1)}, "unit 5": {"units": 5}, "metres that are mm": {"units": 1},
        "two volumes": {"shape": (*SHAPE, 2)}, "five dimensions": {"shape": (*SHAPE, 1, 3)},
        "2D": {"shape": (7, 8)}, "complex": {"dtype": "<c8"}, "slope NaN": {"slope": (nan, 0)},
        "intercept NaN": {"slope": (1, nan)}, "a NaN voxel": {"dtype": "<f4", "fill": nan},
        "cut": {"cut": 200}, "bitpix of another type": {"fields": {"bitpix": 8}},
        "voxels in another file": {"fields": {"magic": b"ni1"}}, "offset 351":
        {"fields": {"vox_offset": 351}}, "offset 0": {"fields": {"vox_offset": 0}},
        "negative size": {"fields": {"dim": (3, -7, 8, 9, 1, 1, 1, 1)}},
    }  # fmt: skip
    found = [Case(f"NIfTI {name}", True, _maker(how)) for name, how in sound.items()]
    found += [Case(f"NIfTI {name}", False, _maker(how)) for name, how in changed.items()]
    found.append(Case("NIfTI gzip data named .nii", True, _maker({"packed": True})))
    found.append(
        Case("NIfTI plain data named .nii.gz", True, _maker({"packed": False}, "scan.nii.gz"))
    )
    return found


def _maker(how: dict[str, Any], name: str = "scan.nii") -> Any:
    return lambda folder: write(folder / name, **how)
