"""What a prediction leaves behind: label map, probabilities, volumes as JSON, a picture.

usam.predict writes them for U-SAM and SAM-Med3D alike; nothing of a patient but the voxels' place
goes into any of them.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from usam.runtime.figures import blend

GEOMETRY = (  # of a NIfTI header: everything that places a voxel
    *("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
STEPS = 65535  # of a probability, which is stored as uint16
MONTAGE = 9  # slices


def nifti_header(source: Path, affine: np.ndarray | None) -> nib.Nifti1Header:
    """A header in millimetres without any text, placed exactly as the scan `source` is.

    A NIfTI file's geometry is copied field by field, codes included. Any other format has its
    affine (4, 4), voxel index -> RAS mm, written as sform and qform; None is the identity.
    """
    if source.is_file() and source.name.lower().endswith((".nii", ".nii.gz")):
        stored = stored_header(source)
        is_nifti2 = isinstance(stored, nib.Nifti2Header)  # whose affine is float64
        header = nib.Nifti2Header() if is_nifti2 else nib.Nifti1Header()
        for field in GEOMETRY:
            header[field] = stored[field]
        header["pixdim"][4:] = 1
    else:
        header = nib.Nifti1Header()
        header.set_sform(np.eye(4) if affine is None else affine, code="scanner")
        header.set_qform(np.eye(4) if affine is None else affine, code="scanner")
    header.set_xyzt_units("mm")
    return header


def stored_header(source: Path) -> nib.Nifti1Header:
    """The header of a NIfTI file without its extensions, which may claim any length."""
    opener = gzip.open if source.name.lower().endswith(".gz") else open
    with opener(source, "rb") as stream:
        block = stream.read(540)
    is_nifti2 = 540 in (int.from_bytes(block[:4], order) for order in ("little", "big"))
    kind = nib.Nifti2Header if is_nifti2 else nib.Nifti1Header
    return kind(block[: kind.sizeof_hdr], check=False)


def write_label_map(path: Path, label: np.ndarray, header: nib.Nifti1Header) -> None:
    """Write label (I, J, K) as uint8 NIfTI placed as `header` says, whole or not at all."""
    assert label.dtype == np.uint8, label.dtype
    header = header.copy()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(label.shape)
    is_nifti2 = isinstance(header, nib.Nifti2Header)
    kind = nib.Nifti2Image if is_nifti2 else nib.Nifti1Image
    image = kind(label, header.get_best_affine(), header)
    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nib.save(image, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


class ProbabilityFile:
    """A 4D NIfTI (I, J, K, classes) on the disk, written some slices at a time, then named `path`.

    Stored as uint16 in steps of 1/65535 with the scale in the header, so that viewers show 0 to 1,
    and not compressed, so that none of it is kept in memory. Use as a context.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], num_classes: int, header: nib.Nifti1Header
    ) -> None:
        self.path, self.scratch = path, path.with_name(f".{os.getpid()}.{path.name}")
        self.shape = (*shape, num_classes)
        self.header = header.copy()
        self.header.set_data_dtype(np.uint16)
        self.header.set_data_shape(self.shape)
        self.header["scl_slope"], self.header["scl_inter"] = 1 / STEPS, 0
        self.offset = self.header.single_vox_offset
        self.header["vox_offset"] = self.offset
        wanted, free = 2 * math.prod(self.shape), shutil.disk_usage(path.parent).free
        if wanted > free:
            raise OSError(
                f"{path}: probabilities take {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )

    def __enter__(self) -> ProbabilityFile:
        with self.scratch.open("wb") as file:
            file.write(self.header.binaryblock + bytes(4))  # no extension follows
            file.truncate(self.offset + 2 * math.prod(self.shape))
        return self

    def write(
        self,
        numbers: Sequence[int],
        steps: np.ndarray,
        canonical: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Slices `numbers` as uint16 (n, C, H, W); canonical: (I, J, K) -> (S, H, W), a view."""
        # Mapped anew each time: the pages written then leave this process's memory.
        stored = np.memmap(
            self.scratch, np.uint16, mode="r+", offset=self.offset, shape=self.shape, order="F"
        )
        for class_id in range(self.shape[3]):
            canonical(stored[..., class_id])[list(numbers)] = steps[:, class_id]

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            os.replace(self.scratch, self.path)
        self.scratch.unlink(missing_ok=True)


def keep_largest(label: np.ndarray) -> None:
    """Set all but the largest piece of every class to background, in place; label (I, J, K).

    Voxels that share a corner belong to one piece. Holds int32 numbers for the box around one
    class at a time.
    """
    touching = np.ones((3, 3, 3), dtype=bool)
    for class_id, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        inside = label[box]
        pieces, count = ndimage.label(inside == class_id, structure=touching)
        if count == 1:
            continue
        sizes = sum(np.bincount(plane.ravel(), minlength=count + 1) for plane in pieces)
        largest = 1 + int(sizes[1:].argmax())
        for plane, number in zip(inside, pieces, strict=True):
            plane[(number > 0) & (number != largest)] = 0


def count_voxels(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Voxels of every class in label (I, J, K), (num_classes,) int64."""
    planes = label.transpose(2, 1, 0)  # as they lie in memory; bincount makes eight bytes of each
    return sum(np.bincount(plane.ravel(), minlength=num_classes) for plane in planes)


def class_volumes(
    voxels: Sequence[int], classes: Sequence[str], colors: Sequence[str], affine: np.ndarray | None
) -> list[dict[str, Any]]:
    """A row a class: id, name, color, voxels and volume_ml; None without an affine (no mm)."""
    millilitres = None if affine is None else abs(np.linalg.det(affine[:3, :3])) / 1000
    return [
        {
            "id": number,
            "name": name,
            "color": color,
            "voxels": int(count),
            "volume_ml": None if millilitres is None else round(int(count) * millilitres, 4),
        }
        for number, (name, color, count) in enumerate(zip(classes, colors, voxels, strict=True))
    ]


def write_description(path: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` as strict JSON."""
    path.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def class_colors(colors: Sequence[str | None] | None, num_classes: int) -> list[str]:
    """A colour a class, #rrggbb: those recorded, matplotlib's tab20 for the others.

    Its ten strong colours come first, then their pale twins, so that few classes look unlike.
    """
    tab20 = matplotlib.colormaps["tab20"].colors
    palette = (*tab20[0::2], *tab20[1::2])
    recorded = list(colors or [])[:num_classes]
    recorded += [None] * (num_classes - len(recorded))
    defaults = ["#000000"] + [to_hex(palette[i % len(palette)]) for i in range(num_classes)]
    return [color or default for color, default in zip(recorded, defaults, strict=False)]


def montage_slices(foreground: np.ndarray) -> list[int]:
    """Of each ninth of the slices with foreground, the one with most of it; else the middle one.

    foreground: voxels a slice, (S,). Spread, since neighbours look alike.
    """
    parts = np.array_split(np.flatnonzero(foreground), MONTAGE)
    numbers = [int(part[foreground[part].argmax()]) for part in parts if len(part)]
    return numbers or [len(foreground) // 2]


def save_montage(
    path: Path,
    numbers: Sequence[int],
    plane: Callable[[int], np.ndarray],
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    colors: Sequence[str],
    aspect: float = 1.0,
    transpose: bool = False,
    title: str = "",
) -> None:
    """Slices with their classes tinted, as one PNG.

    numbers: the slices to show; plane: slice -> uint8 (H, W); labels (S, H, W); aspect: height of
    a pixel over its width. `transpose` turns slices upright that are stored on their side.
    """
    columns = math.ceil(math.sqrt(len(numbers)))
    rows = math.ceil(len(numbers) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, k in zip(axes, numbers, strict=False):
        image, mask = plane(k), labels[k]
        if transpose:
            image, mask = image.T, mask.T
        axis.imshow(blend(image, mask, colors), aspect=aspect)
        axis.set_title(f"slice {k}", fontsize=9)
    shown = np.unique(labels[list(numbers)])
    handles = [Patch(color=colors[i], label=classes[i]) for i in shown if i]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False
        )
    figure.suptitle(title if handles else f"{title}: no foreground", fontsize=10)
    figure.savefig(path, dpi=110)
