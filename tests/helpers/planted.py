"""What can be planted in sound data: faults that verify must find, and oddities it must tell."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.helpers import layouts

IMAGE, LABEL = "imagesTr/word_0002.nii.gz", "labelsTr/word_0002.nii.gz"
SLICE, CSV = "train/train_npz/case1_slice1.npz", "train/train_bbox.csv"


def voxels(name: str, change: Callable[[np.ndarray], np.ndarray], **geometry) -> Callable:
    """A fault: a NIfTI with its voxels (and affine) changed."""

    def plant(root: Path) -> None:
        image = nib.load(root / name)
        array = change(np.asarray(image.dataobj).copy())
        layouts.write(root / name, array, geometry.get("affine", image.affine))

    return plant


def content(name: str, change: Callable[[bytes], bytes]) -> Callable:
    """A fault: a file with its bytes changed."""

    def plant(root: Path) -> None:
        (root / name).write_bytes(change((root / name).read_bytes()))

    return plant


def npz(name: str, **change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """A fault: a slice of CARE with an array changed, or left out if the change is None."""

    def plant(root: Path) -> None:
        arrays = dict(np.load(root / name))
        for key, how in change.items():
            arrays[key] = how(arrays[key])
        np.savez(root / name, **{key: value for key, value in arrays.items() if value is not None})

    return plant


def copy(source: str, target: str) -> Callable:
    """A fault: a file that is there twice."""
    return lambda root: shutil.copy(root / source, root / target)


def both(*plants: Callable) -> Callable:
    """Faults that belong together."""
    return lambda root: [plant(root) for plant in plants]


def unlink(name: str) -> Callable:
    """A fault: a missing file."""
    return lambda root: (root / name).unlink()


def table(name: str, change: Callable[[dict], None]) -> Callable:
    """A fault: a JSON file changed."""

    def plant(root: Path) -> None:
        content = json.loads((root / name).read_text(encoding="utf-8"))
        change(content)
        (root / name).write_text(json.dumps(content), encoding="utf-8")

    return plant


def entry(file: str, value: float) -> Callable:
    """One voxel set to a value; floats where it needs them."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32 if value != int(value) else np.int16)
        array[12, 10, 3] = value
        return array

    return voxels(file, change)


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array[1, 2, 3] = np.nan
    return array


def one_pixel(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[3, 4] = value
    return array


def header_claims(length: int) -> Callable[[bytes], bytes]:
    """The first dimension of a gzipped NIfTI claims another length."""

    def change(data: bytes) -> bytes:
        plain = gzip.decompress(data)
        return gzip.compress(plain[:42] + length.to_bytes(2, "little") + plain[44:])

    return change


ARRAY = "cases/word_0002.image.npy"


MASK = "cases/word_0002.mask.npy"


FAULTS = {  # name: (layout, fault, file that must be named, what must be said)
    "image of nonsense": ("word", content(IMAGE, lambda _: b"hello"), IMAGE, "not a readable"),
    "image cut off": ("word", content(IMAGE, lambda data: data[:1000]), IMAGE, "truncated"),
    "image of no bytes": ("word", content(IMAGE, lambda _: b""), IMAGE, "not a readable"),
    "checksum wrong": (
        "word",
        content(IMAGE, lambda data: data[:-6] + b"\x55" + data[-5:]),
        IMAGE,
        "damaged gzip",
    ),
    "image with NaN": ("word", voxels(IMAGE, with_nan), IMAGE, "1 voxels are NaN"),
    "header of a bomb": ("word", content(IMAGE, header_claims(32000)), IMAGE, "header claims"),
    "image of two dimensions": ("word", voxels(IMAGE, lambda a: a[:, :, 0]), IMAGE, "2D image"),
    "image of four dimensions": (
        "word",
        voxels(IMAGE, lambda a: np.stack([a, a], 3)),
        IMAGE,
        "2 volumes",
    ),
    "label cut off": ("word", content(LABEL, lambda data: data[:200]), LABEL, "truncated"),
    "label of another shape": ("word", voxels(LABEL, lambda a: a[:-1]), LABEL, "shapes differ"),
    "label shifted": (
        "word",
        voxels(LABEL, np.array, affine=layouts.AFFINE + np.eye(4)[:, [3, 3, 3, 0]] * 5),
        LABEL,
        "affines differ by 5 mm",
    ),
    "label mirrored": (
        "word",
        voxels(LABEL, np.array, affine=np.diag([2.0, -2.0, 3.0, 1.0])),
        LABEL,
        "affines differ",
    ),
    "label id too high": (
        "word",
        entry(LABEL, 17),
        LABEL,
        "ids 17 are outside the class table, 0 to 16",
    ),
    "label id below zero": ("word", entry(LABEL, -1), LABEL, "ids -1 are outside the class table"),
    "label id 255": ("word", entry(LABEL, 255), LABEL, "ids 255 are outside the class table"),
    "fractional label": ("word", entry(LABEL, 1.5), LABEL, "not whole numbers: 1.5"),
    "empty label": ("word", voxels(LABEL, np.zeros_like), LABEL, "empty label"),
    "image without label": ("word", unlink(LABEL), IMAGE, "image without a label"),
    "label without image": ("word", unlink(IMAGE), LABEL, "label without an image"),
    "case in two splits": (
        "word",
        both(copy(IMAGE, "imagesTs/word_0002.nii.gz"), copy(LABEL, "labelsTs/word_0002.nii.gz")),
        "imagesTs/word_0002.nii.gz",
        "is in test and in train",
    ),
    "copy under another name": (
        "word",
        both(copy(IMAGE, "imagesTs/word_0099.nii.gz"), copy(LABEL, "labelsTs/word_0099.nii.gz")),
        "imagesTs/word_0099.nii.gz",
        "the same image as imagesTr/word_0002",
    ),
    "two files of one case": (
        "word",
        copy(IMAGE, "imagesTr/word_0002.nii"),
        "imagesTr",
        "two scans named word_0002",
    ),
    "regions in the table": (
        "nnunet",
        table("dataset.json", lambda t: t["labels"].update(both=[1, 2])),
        "dataset.json",
        "region labels.*both",
    ),
    "table not JSON": (
        "nnunet",
        content("dataset.json", lambda _: b"{"),
        "dataset.json",
        "not an nnU-Net dataset.json",
    ),
    "label outside the nnU-Net table": (
        "nnunet",
        entry("labelsTr/case_001.nii.gz", 3),
        "labelsTr/case_001.nii.gz",
        "ids 3 are outside the class table, 0 to 2",
    ),
    "folder: label without image": (
        "folder",
        unlink("images/case_001_0000.nii.gz"),
        "labels/case_001.nii.gz",
        "label without an image",
    ),
    "CSV names no file": (
        "care",
        content(CSV, lambda data: data + b'case9_slice9,"[1, 2, 3, 4]"\n'),
        CSV,
        "names 'case9_slice9'",
    ),
    "file not in the CSV": ("care", copy(SLICE, SLICE.replace("1_", "3_")), "", "is not in train"),
    "code in the CSV": (
        "care",
        content(CSV, lambda data: data + b"x,__import__('os').system('true')\n"),
        CSV,
        "line 5",
    ),
    "CSV points outside": (
        "care",
        content(CSV, lambda data: data + b'../../x,"[1, 2, 3, 4]"\n'),
        CSV,
        "points outside",
    ),
    "CSV missing": ("care", unlink(CSV), CSV, "is missing"),
    "slice cut off": ("care", content(SLICE, lambda data: data[:900]), SLICE, "npz"),
    "slice without label": ("care", npz(SLICE, label=lambda _: None), SLICE, "no array 'label'"),
    "slice with infinity": (
        "care",
        npz(SLICE, image=lambda a: one_pixel(a, np.inf)),
        SLICE,
        "finite",
    ),
    "slice with label 4": ("care", npz(SLICE, label=lambda a: one_pixel(a, 4)), SLICE, "ids 4"),
    "slice with label 1.5": (
        "care",
        npz(SLICE, label=lambda a: one_pixel(a, 1.5)),
        SLICE,
        "ids 1.5",
    ),
    "slice of two shapes": ("care", npz(SLICE, label=lambda a: a[:-1]), SLICE, "differ in shape"),
    "slice without a label inside": ("care", npz(SLICE, label=np.zeros_like), SLICE, "empty label"),
    "slice in two splits": (
        "care",
        both(
            copy(SLICE, "test/test_npz/case1_slice1.npz"),
            content("test/test_bbox.csv", lambda data: data + b'case1_slice1,"[8, 10, 16, 20]"\n'),
        ),
        "test/test_npz/case1_slice1.npz",
        "case case1 is in test and in train",
    ),
    "index not JSON": ("store", content("index.json", lambda d: d[:-9]), "index.json", "JSON"),
    "index points outside": (
        "store",
        table("index.json", lambda t: t["cases"][0].update(file="../x")),
        "index.json",
        "not a plain file name",
    ),
    "index of another case": (
        "store",
        table("index.json", lambda t: t["cases"][1].update(id="word_0005")),
        "cases/word_0005",
        "is in test and in train",
    ),
    "array cut off": (
        "store",
        content(ARRAY, lambda data: data[:-100]),
        "cases/word_0002",
        "expected .* bytes, found",
    ),
    "array missing": ("store", unlink(ARRAY), "cases/word_0002", "missing"),
    "array with a bomb's header": (
        "store",
        content(ARRAY, lambda data: data.replace(b"(6, 20, 24)", b"(9999, 9999, 9999)")),
        "cases/word_0002",
        "expected .*, found",
    ),
    "mask with a bit flipped": (
        "store",
        content(MASK, lambda data: data[:-1] + b"\x01"),
        "cases/word_0002",
        "those in the index",
    ),
    "mask outside the table": (
        "store",
        content(MASK, lambda data: data[:-1] + b"\xff"),
        "cases/word_0002",
        "label ids 255 are outside",
    ),
    "splits unlike the index": (
        "store",
        table("splits.json", lambda t: t["train"].append("word_0005")),
        "splits.json",
        "train names word_0005",
    ),
    "folds that overlap": (
        "store",
        table("splits.json", lambda t: t["folds"][0]["train"].append(t["folds"][0]["val"][0])),
        "splits.json",
        "fold 0 does not divide",
    ),
}


ODDITIES = {
    "spacing unlike the others": (
        both(
            voxels(IMAGE, np.array, affine=np.diag([-9.0, -9.0, 3.0, 1.0])),
            voxels(LABEL, np.array, affine=np.diag([-9.0, -9.0, 3.0, 1.0])),
        ),
        IMAGE,
        "spacing in plane 9 mm; the median is 2",
    ),
    "not in HU": (voxels(IMAGE, lambda a: a + 1000), IMAGE, "unusual for HU"),
    "one value": (voxels(IMAGE, np.zeros_like), IMAGE, "every voxel is 0"),
    "tiny lesion": (
        voxels(LABEL, lambda a: np.where((a == 16) & (np.arange(6) != 2), 0, a)),
        LABEL,
        "class 16 has only 9 voxels",
    ),
    "copy in the same split": (
        both(copy(IMAGE, "imagesTr/word_0098.nii.gz"), copy(LABEL, "labelsTr/word_0098.nii.gz")),
        "imagesTr/word_0098.nii.gz",
        "the same image as",
    ),
    "no test labels": (
        unlink("labelsTs/word_0005.nii.gz"),
        "imagesTs/word_0005.nii.gz",
        "image without a label",
    ),
}
