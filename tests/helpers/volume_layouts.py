"""Small drawn volumes in the layouts of SAM-Med3D, nnU-Net and plain pairs, in any orientation."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from dataset.prepare.command import main
from dataset.store.volumes import VolumeStore

SPACING = (1.2, 1.5, 2.0)
SHAPE = (40, 34, 26)


def blob(shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int = 3) -> tuple:
    """(image int16, label uint8, RAS affine) of two ellipsoids in noise."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(
        *[np.arange(n) * mm for n, mm in zip(shape, spacing, strict=True)], indexing="ij"
    )
    label = np.zeros(shape, dtype=np.uint8)
    for number, (middle, radius) in enumerate([((16, 17, 20), 9), ((28, 24, 15), 7)], start=1):
        label[sum((a - m) ** 2 for a, m in zip(axes, middle, strict=True)) < radius**2] = number
    image = (100 * label - 50 + rng.integers(-40, 40, shape)).astype(np.int16)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -30, 12, 100
    return image, label, affine


def stored_as(array: np.ndarray, affine: np.ndarray, codes: str) -> nib.Nifti1Image:
    """The RAS array as a file with other axes."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    back = nib.orientations.inv_ornt_aff(turn, array.shape)
    return nib.Nifti1Image(nib.orientations.apply_orientation(array, turn), affine @ back)


def save_as(folder: Path, codes: str, image, label, affine) -> tuple[Path, Path]:
    paths = folder / f"{codes}_image.nii.gz", folder / f"{codes}_label.nii.gz"
    for path, array in zip(paths, (image, label), strict=True):
        nib.save(stored_as(array, affine, codes), path)
    return paths


def scan(folder: Path, name: str, *, seed: int = 0, binary: int = 0, labels: str = "labelsTr"):
    """One case as SAM-Med3D's layout, WORD and nnU-Net store it; binary keeps one label as 1."""
    image, label, affine = blob(SHAPE, SPACING, seed)
    if binary:
        label = (label == binary).astype(np.uint8)
    for kind, array in ((labels.replace("labels", "images"), image), (labels, label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), folder / kind / f"{name}.nii.gz")
    return image, label, affine


def layout(root: Path, classes=("liver", "kidney"), number: int = 4) -> Path:
    for binary, name in enumerate(classes, start=1):
        for seed in range(number):
            scan(root / name / "ct_demo", f"case{seed}", seed=seed, binary=binary)
    return root


def prepared(root: Path, output: Path, *flags: str) -> VolumeStore:
    arguments = ["volumes", "--input", str(root), "--output", str(output), "--workers", "1"]
    assert main([*arguments, *flags]) == 0
    return VolumeStore(output)
