"""The slice store: whole or absent, checked, opened quickly."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from dataset.store.folder import new_store, npy_header
from dataset.store.slices import SliceStore, write_case, write_index

CLASSES = [{"id": i, "name": n, "color": "#000000"} for i, n in enumerate(["background", "a", "b"])]


def make_store(folder: Path, *, cases: int = 6, split: str = "train", side: int = 32) -> Path:
    """A store of `cases` cases with three slices each; the middle one has no foreground."""
    rng = np.random.default_rng(3)
    entries = []
    for number in range(cases):
        image = rng.integers(0, 256, (3, side, side), dtype=np.uint8)
        mask = np.zeros((3, side, side), np.uint8)
        mask[::2, 4:9, 5:7] = 1 + number % 2
        names = [f"c{number}_{k}" for k in range(3)]
        entry = {"id": f"c{number}", "split": split, "file": f"{split}_c{number}", "slices": names}
        entries.append(write_case(folder, entry, image, mask))
    write_index(folder, index_of(entries))
    return folder


def index_of(entries: list[dict]) -> dict:
    return {
        "dataset": "folder",
        "classes": CLASSES,
        "window": [-160, 240],
        "orientation": "LPS",
        "clahe": True,
        "source": "0",
        "cases": entries,
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    image = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    mask = (image % 3).astype(np.uint8)
    entry = {
        "id": "x",
        "split": "test",
        "file": "x",
        "slices": ["x0", "x1"],
        "listed": [True, False],
    }
    write_index(tmp_path, index_of([write_case(tmp_path, entry, image, mask)]))
    store = SliceStore(tmp_path)
    assert store.classes == ["background", "a", "b"]
    assert store.slices("test") == [(0, 0)]
    assert store.slices("train") == []
    assert store.cases[0]["pixels"] == [[7, 7, 6], [7, 6, 7]]
    read = store.read(0, 1)
    np.testing.assert_array_equal(read[0], image[1])
    np.testing.assert_array_equal(read[1], mask[1])
    assert isinstance(read[0].base.base, np.memmap)
    assert not list(tmp_path.rglob(".*"))


def test_the_index_is_deterministic_and_sorted(tmp_path: Path) -> None:
    first = SliceStore(make_store(tmp_path / "a"))
    entries = json.loads((tmp_path / "a" / "index.json").read_text(encoding="utf-8"))["cases"]
    write_index(tmp_path / "b", index_of(entries[::-1]))
    assert SliceStore(tmp_path / "b").digest == first.digest
    assert [case["id"] for case in first.cases] == [f"c{i}" for i in range(6)]


def test_labels_outside_the_class_table_are_refused(tmp_path: Path) -> None:
    mask = np.full((1, 4, 4), 3, np.uint8)
    entry = {"id": "x", "split": "test", "file": "x", "slices": ["x0"]}
    with pytest.raises(ValueError, match="x: labels outside the 3 classes"):
        write_index(tmp_path, index_of([write_case(tmp_path, entry, mask, mask)]))
    make_store(tmp_path / "s", cases=1)
    path = tmp_path / "s" / "cases" / "train_c0.mask.npy"
    np.save(path, np.full((3, 32, 32), 9, np.uint8))
    with pytest.raises(ValueError, match="c0_1: label ids 9 are outside the class table, 0 to 2"):
        SliceStore(tmp_path / "s").read(0, 1)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "", "a\0b", "a\\b", ".x", "c:x", 7])
def test_case_files_must_be_plain_names(tmp_path: Path, name: object) -> None:
    array = np.zeros((1, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="plain file name"):
        write_case(tmp_path, {"file": name, "slices": ["x"]}, array, array)
    index = json.loads((make_store(tmp_path / "s") / "index.json").read_text(encoding="utf-8"))
    index["cases"][0]["file"] = name
    (tmp_path / "s" / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="plain file name"):
        SliceStore(tmp_path / "s")


def _set(key: str, value: object, case: bool = True):
    def change(index: dict) -> None:
        (index["cases"][0] if case else index)[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", 2, case=False), "expected slice store format 1, found 2"),
        (_set("classes", CLASSES[:1], case=False), "2 to 256 classes"),
        (_set("classes", [*CLASSES, {"id": 9, "name": "c"}], case=False), "class 3 must be"),
        (_set("classes", CLASSES[:2], case=False), "labels outside the 2 classes"),
        (_set("cases", None, case=False), "no list of cases"),
        (_set("cases", [3], case=False), "must be an object"),
        (_set("split", "dev"), "train/val/test"),
        (_set("id", 4), "text id"),
        (_set("shape", [3, 32]), r"shape \[S, H, W\]"),
        (_set("shape", [3, 32, -1]), r"shape \[S, H, W\]"),
        (_set("slices", ["one"]), "3 slice names"),
        (_set("listed", [True]), "'listed'"),
        (_set("spacing", [2.5, 0, 1]), "spacing"),
        (lambda index: index["cases"][0].pop("listed"), "a case without 'listed'"),
        (_set("pixels", [[1, 2, 3]]), "pixel counts"),
        (_set("file", "train_c1"), "two cases named"),
    ],
)
def test_an_unsound_index_is_refused(tmp_path: Path, change, message: str) -> None:
    index = json.loads((make_store(tmp_path, cases=2) / "index.json").read_text(encoding="utf-8"))
    change(index)
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        SliceStore(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "\xff"])
def test_an_index_that_is_not_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json"):
        SliceStore(tmp_path)


def test_a_folder_without_an_index_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no slice store in .*dataset phantom"):
        SliceStore(tmp_path)


def _npy(
    shape: tuple[int, ...], descr: str = "|u1", fortran: bool = False, data: int = 64
) -> bytes:
    head = str({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    head += b" " * (118 - len(head)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an array",
        _npy((3, 32, 32)),
        _npy((100_000, 1_000, 1_000)),
        _npy((3, 32, 32), "|O"),
        _npy((3, 32, 32), "<f8", data=3 * 32 * 32 * 8),
        _npy((3, 32, 32), fortran=True, data=3 * 32 * 32),
        b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff" + b"{" * 5000,
        b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
    ],
)
def test_an_array_that_is_not_what_the_index_says_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    path = make_store(tmp_path) / "cases" / "train_c0.image.npy"
    path.write_bytes(content)
    store = SliceStore(tmp_path)
    with pytest.raises(ValueError, match=r"train_c0\.image\.npy"):
        store.read(0, 0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train_c0\.image\.npy"):
        store.read(0, 0)


def test_headers_of_good_arrays_are_read() -> None:
    assert npy_header(_npy((3, 4)))[:3] == ((3, 4), False, np.dtype("u1"))


def test_files_of_others_are_refused_or_kept(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", cases=2)
    (folder / ".gitignore").write_text("*", encoding="utf-8")
    (folder / "cases" / "mine.mask.npy").write_bytes(b"by hand")
    with pytest.raises(ValueError, match=r"cases/mine\.mask\.npy was not written .*--overwrite"):
        new_store(folder, "preparing").__enter__()
    with new_store(folder, "preparing", overwrite=True) as new:
        make_store(new, cases=1)
    assert len(SliceStore(folder).cases) == 1
    assert (folder / ".gitignore").is_file()
    assert len(list((folder / "cases").iterdir())) == 2
    for name in ("index.json", "thesis.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("[]", encoding="utf-8")
        with pytest.raises(ValueError, match=f"{name} was not written by this program"):
            new_store(tmp_path / name, "preparing").__enter__()
    with pytest.raises(ValueError, match=r"thesis\.txt was .*; choose another folder$"):
        new_store(tmp_path / "thesis.txt", "preparing", overwrite=True).__enter__()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.json", "store", "thesis.txt"]


def test_a_store_replaced_while_in_use_is_an_error(tmp_path: Path) -> None:
    store = SliceStore(make_store(tmp_path / "store", cases=3))
    store.read(0, 0)
    (store.folder / "index.json").touch()
    store.read(1, 0)  # the same content
    with new_store(store.folder, "preparing") as new:
        make_store(new, cases=4)
    with pytest.raises(ValueError, match="was replaced while in use"):
        store.read(2, 0)


def test_digests_follow_the_images_and_are_made_for_older_stores(tmp_path: Path) -> None:
    folder = make_store(tmp_path, cases=3)
    kept = SliceStore(folder).case_digests(range(3))
    assert len(set(kept.values())) == 3
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for case in index["cases"]:
        assert case.pop("digests")["image"] == kept[case["id"]]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    assert SliceStore(folder).case_digests(range(3)) == kept


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "two classes named 'a'"),
        (["", "b"], "class 1 has an empty name"),
        (["Background", "b"], "class 1 is named 'Background'"),
        (["a", "b\x1b[2J"], "control characters"),
    ],
)
def test_class_names_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    rows = [{"id": i, "name": name} for i, name in enumerate(["background", *names])]
    mask = np.zeros((1, 4, 4), np.uint8)
    entry = {"id": "x", "split": "test", "file": "x", "slices": ["x0"]}
    with pytest.raises(ValueError, match=message):
        write_index(tmp_path, {"classes": rows, "cases": [write_case(tmp_path, entry, mask, mask)]})


def test_a_store_pickles_without_its_maps_and_keeps_few_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dataset.store.folder.MAX_OPEN_CASES", 2)
    store = SliceStore(make_store(tmp_path))
    small = len(pickle.dumps(store))
    for number in range(6):
        store.read(number, 0)
    assert len(store._maps) == 2
    assert len(pickle.dumps(store)) == small
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.read(4, 2)[0], store.read(4, 2)[0])


def test_an_index_of_33000_slices_opens_quickly(tmp_path: Path) -> None:
    row = [200_000] + [100] * 16
    case = {"split": "train", "shape": [1, 512, 512], "pixels": [row]}
    case |= {"listed": None, "spacing": None, "affine": None}
    cases = [{**case, "id": str(i), "file": str(i), "slices": [str(i)]} for i in range(33_000)]
    classes = [{"id": i, "name": str(i), "color": "#000000"} for i in range(17)]
    write_index(tmp_path, {**index_of(cases), "classes": classes})
    start = time.process_time()
    assert len(SliceStore(tmp_path).slices("train")) == 33_000
    assert time.process_time() - start < 5
