"""Slices of the CARE release that are not what they should be are refused by name, unread."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dataset.care import read_slice
from tests.dataset.test_rectum import write_npz

GOOD = np.zeros((4, 4))


def _with(array: np.ndarray, value: float) -> np.ndarray:
    return np.where(np.arange(array.size).reshape(array.shape) == 5, value, array)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (_with(GOOD, np.nan), GOOD, "finite"),
        (_with(GOOD, np.inf), GOOD, "finite"),
        (GOOD.astype(np.uint8), GOOD, "finite floats"),
        (GOOD, _with(GOOD, 255), "label ids 255 are"),
        (GOOD, _with(GOOD, 4), "label ids 4 are"),
        (GOOD, _with(GOOD, -1), "label ids -1 are"),
        (GOOD, _with(GOOD, 1.5), "label ids 1.5 are"),
        (GOOD, _with(GOOD, np.nan), "label ids nan are"),
        (GOOD, np.zeros((4, 5)), "differ in shape"),
        (np.zeros((4, 4, 3)), GOOD, r"image is \(4, 4, 3\)"),
        (np.zeros((0, 4)), GOOD, r"image is \(0, 4\)"),
        (np.zeros((1, 5000)), GOOD, "4096 x 4096"),
        (np.full((4, 4), "x"), GOOD, "not numbers"),
        (np.full((4, 4), None), GOOD, "not numbers"),
        (GOOD.astype(complex), GOOD, "not numbers"),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path: Path, image, label, message: str) -> None:
    path = write_npz(tmp_path / "bad.npz", image, label)
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}"):
        read_slice(path)


@pytest.mark.parametrize("key", ["image", "label"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    np.savez(tmp_path / "x.npz", **{k: GOOD for k in ("image", "label", "other") if k != key})
    with pytest.raises(ValueError, match=rf"x\.npz: no array '{key}'.*other\.npy"):
        read_slice(tmp_path / "x.npz")


def _zip_of(path: Path, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key in ("image", "label"):
            archive.writestr(f"{key}.npy", content)
    return path


def _npy(shape: tuple[int, ...], data: bytes = b"", descr: str = "<f8", version: int = 1) -> bytes:
    stream = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": descr}
    write = np.lib.format.write_array_header_1_0
    (write if version == 1 else np.lib.format.write_array_header_2_0)(stream, header)
    return stream.getvalue() + data


@pytest.mark.parametrize(
    "content",
    [
        _npy((100_000, 125_000)),  # 100 GB
        _npy((4096, 4096), version=2),
        _npy((4, 4), bytes(127)),
        _npy((4, 4), bytes(129)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100_000,
        b"\x93NUMPY\x03\x00\x00\x00",
        b"\x93NUMPY\x01\x00\x08\x00((((((((",
        b"nonsense",
        b"",
    ],
)
def test_an_array_that_is_not_what_its_header_claims_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    path = _zip_of(tmp_path / "bomb.npz", content)
    assert path.stat().st_size < 1024
    with pytest.raises(ValueError, match=r"bomb\.npz"):
        read_slice(path)


def test_a_member_that_unpacks_to_more_than_its_header_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("image", "label"):
            archive.writestr(f"{key}.npy", _npy((4, 4), bytes(64 << 20)))
    with pytest.raises(ValueError, match="cut or damaged"):
        read_slice(path)


def test_other_compressions_and_pickles_are_refused(tmp_path: Path) -> None:
    content = _npy((4, 4), bytes(128))
    with pytest.raises(ValueError, match="never writes"):
        read_slice(_zip_of(tmp_path / "lzma.npz", content, zipfile.ZIP_LZMA))
    with pytest.raises(ValueError, match="not numbers"):
        read_slice(_zip_of(tmp_path / "object.npz", _npy((4, 4), bytes(128), descr="|O")))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = write_npz(tmp_path / "hurt.npz")
    whole = path.read_bytes()
    middle = len(whole) // 3
    path.write_bytes(
        {
            "cut": whole[:middle],
            "flip": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"hello",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"hurt\.npz"):
        read_slice(path)
