"""Models that know the answer, and scans turned every way, for tests of prediction."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from dataset.scans.slices import ScanSlices
from usam.prediction.prompts import ScanPrompts
from usam.prediction.results import ResultFiles
from usam.prediction.slices import Predictor, segment_scan
from usam.runtime.precision import Precision

SIDE, DEPTH = 12, 7
WINDOW = (-160.0, 240.0)
STEP = 25  # HU between two classes of the oracle
CODES = ["LPS", "RAS", "LAS", "RPS", "PIR", "SAL"]
CPU = Precision(torch.device("cpu"), None)


def lps_affine(zooms: tuple[float, float, float] = (2.0, 2.0, 3.0)) -> np.ndarray:
    affine = np.diag([-zooms[0], -zooms[1], zooms[2], 1.0])
    affine[:3, 3] = 31.0, 27.5, -40.25
    return affine


def turned(array: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same scan stored along other axes."""
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    there = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    return nib.apply_orientation(array, turn), there


def truth(num_classes: int = 17) -> np.ndarray:
    """Labels (x, y, z) without any symmetry."""
    label = np.zeros((SIDE, SIDE, DEPTH), dtype=np.uint8)
    for number in range(1, num_classes):
        x, y, z = (3 * number) % 11, (5 * number) % 10, number % 6
        label[x : x + 1 + number % 3, y : y + 2, z : z + 2] = number
    return label


def coded(label: np.ndarray) -> np.ndarray:
    """HU that tell the label."""
    return (WINDOW[0] + STEP * label.astype(np.float64)).astype(np.int16)


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"] = b"NAME^PATIENT"
    nib.save(image, path)
    return path


class Oracle(nn.Module):
    """Reads the label off the intensity of `coded`; remembers what it was shown."""

    def __init__(self, num_classes: int = 17) -> None:
        super().__init__()
        values = STEP * torch.arange(num_classes) / (WINDOW[1] - WINDOW[0])
        self.values, self.shown = values.view(1, -1, 1, 1), []

    def forward(self, image: Tensor, points: object = None, boxes: object = None) -> Tensor:
        self.shown.append((image, points, boxes))
        return -1e4 * (image - self.values).square()


class Marker(nn.Module):
    """Two classes: what its prompts touch is class 1."""

    def forward(
        self,
        image: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        marked = torch.full_like(image[:, 0], -1.0)
        for n in range(len(image)):
            if boxes is not None:
                x1, y1, x2, y2 = boxes[n].round().int().tolist()
                marked[n, y1 : y2 + 1, x1 : x2 + 1] = 1.0
            for (x, y), label in zip(*(p[n] for p in points), strict=True) if points else ():
                if label == 1:
                    marked[n, int(y.round()), int(x.round())] = 1.0
        return torch.stack([-marked, marked], dim=1)


def data_of(num_classes: int = 17, side: int = SIDE, **other: object) -> dict:
    """A checkpoint's data; its image is three times the slice, so centres meet centres."""
    names = ["background", *(f"organ {i}" for i in range(1, num_classes))]
    return {
        "classes": names, "img_size": 3 * side, "window": list(WINDOW), "orientation": "LPS",
        "spacing": None, "clahe": False, "crop": 0.0, **other,
    }  # fmt: skip


def predict(
    scan: Path,
    folder: Path,
    model: nn.Module,
    data: dict,
    *,
    prompts: ScanPrompts | None = None,
    window: object = None,
    **how: object,
) -> nib.Nifti1Image:
    """The label map that the scan's prediction leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    files, overlay = ResultFiles(folder, "out"), how.pop("overlay", False)
    found = segment_scan(
        ScanSlices(scan, data, window=window),
        Predictor(model, CPU, data, batch_size=3, **how), prompts=prompts or ScanPrompts(),
        facts={"checkpoint": "best.pth", "model": "oracle"}, probability_file=files.probabilities,
    )  # fmt: skip
    found.write(files, overlay=overlay)
    return nib.load(folder / "out_seg.nii.gz")


def check_same_place(image: nib.Nifti1Image, scan: Path, label: np.ndarray) -> None:
    """The file holds `label`, voxel for voxel, placed as the scan is and without any text."""
    stored = nib.load(scan)
    np.testing.assert_array_equal(np.asarray(image.dataobj), label)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, stored.affine)
    for code in ("qform_code", "sform_code"):
        assert image.header[code] == stored.header[code]
    np.testing.assert_allclose(image.get_qform(), stored.get_qform(), atol=1e-6)
    assert image.header["descrip"].item() == b""
