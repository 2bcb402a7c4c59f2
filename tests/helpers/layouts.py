"""Small raw data sets written in the layouts of WORD, nnU-Net, CARE and two plain folders.

And the store of slices that such data become.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from dataset.store.slices import write_case, write_index

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
SHAPE = (24, 20, 6)


def scan(number: int = 0, num_classes: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """int16 image in HU and uint8 label, (x, y, z): a body with one block per class."""
    rng = np.random.default_rng(number)
    label = np.zeros(SHAPE, dtype=np.uint8)
    for class_id in range(1, num_classes):
        x, y = 4 + 3 * (class_id % 5), 4 + 3 * (class_id // 5)
        label[x : x + 3, y : y + 3, 1:5] = class_id
    image = np.full(SHAPE, -1000, dtype=np.int16)
    image[3:21, 3:17] = 20
    image[10:13, 14:16] = 400  # the spine
    image = image + 10 * label.astype(np.int16) + rng.integers(-5, 6, SHAPE, dtype=np.int16)
    return image, label


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """The array as NIfTI; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def word(
    root: Path, cases: Mapping[str, Sequence[int]], *, suffix: str = "", val: str = "Val"
) -> Path:
    """A WORD copy: cases maps Tr, Val, Ts to numbers; suffix goes behind the images' names."""
    for end, numbers in cases.items():
        folder = val if end == "Val" else end
        for number in numbers:
            image, label = scan(number)
            write(root / f"images{folder}" / f"word_{number:04d}{suffix}.nii.gz", image)
            write(root / f"labels{folder}" / f"word_{number:04d}.nii.gz", label)
    return root


def nnunet(root: Path, table: dict, numbers: Sequence[int] = (1, 2), channels: int = 1) -> Path:
    """An nnU-Net raw data set of two labels with the given dataset.json."""
    for number in numbers:
        image, label = scan(number, 3)
        for channel in range(channels):
            name = f"case_{number:03d}_{channel:04d}.nii.gz"
            write(root / "imagesTr" / name, image + 100 * channel)
        write(root / "labelsTr" / f"case_{number:03d}.nii.gz", label)
    (root / "dataset.json").write_text(json.dumps(table), encoding="utf-8")
    return root


def care(root: Path, slices: Mapping[str, Sequence[str]]) -> Path:
    """A CARE release: slices maps train and test to names; every slice is in the CSV."""
    for split, names in slices.items():
        folder = root / split / f"{split}_npz"
        folder.mkdir(parents=True)
        rows = ["name,bbox"]
        for number, name in enumerate(names):
            label = np.zeros((32, 32))
            label[8 + number : 16, 10:20] = 1
            label[12:16, 12:16] = 2
            image = np.random.default_rng(list(name.encode())).random((32, 32))
            np.savez(folder / f"{name}.npz", image=image, label=label)
            rows.append(f'{name},"[8, 10, 16, 20]"')
        (root / split / f"{split}_bbox.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def slice_store(
    folder: Path,
    *,
    train: int = 6,
    test: int = 2,
    num_slices: int = 3,
    side: int = 32,
    num_classes: int = 3,
) -> Path:
    """A store of noisy cases with one block a class, (num_slices, side, side) each."""
    cases, draw, edge = [], np.random.default_rng(0), side // 4
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            image = draw.integers(0, 80, (num_slices, side, side)).astype(np.uint8)
            mask = np.zeros_like(image)
            for label in range(1, num_classes):
                x, y = draw.integers(0, side - edge, 2)
                mask[:, y : y + edge, x : x + edge] = label
            name = f"{split}{number}"
            entry = {"id": name, "split": split, "file": name}
            entry["slices"] = [f"{name}_slice{k}" for k in range(num_slices)]
            cases.append(write_case(folder, entry, image + 40 * mask, mask))
    names = ["background", "organ", "tumour", "vessel"][:num_classes]
    rows = zip(names, ["#000000", "#00ff00", "#ff0000", "#0000ff"], strict=False)
    write_index(folder, {
        "dataset": "folder", "window": [-160, 240], "orientation": "LPS", "clahe": True,
        "source": "0", "cases": cases,
        "classes": [{"id": i, "name": n, "color": c} for i, (n, c) in enumerate(rows)],
    })  # fmt: skip
    return folder
