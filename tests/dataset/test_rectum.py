"""The CARE release: packed once, checked file by file, pixel for pixel as recorded."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dataset import build_dataset, open_store
from dataset import care as rectum
from dataset.care import read_boxes, read_slice

CSV = "name,bbox\n{}\n"


def write_npz(path: Path, image: object = None, label: object = None, **others: object) -> Path:
    """A slice of the release; arrays not given are plausible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.stem))
    arrays = {
        "image": rng.uniform(-0.1, 1.1, (16, 16)) if image is None else image,
        "label": np.arange(256.0).reshape(16, 16) % 3 if label is None else label,
    }
    np.savez_compressed(path, **{**arrays, **others})
    return path


def make_release(root: Path, train: list[str], test: list[str], *, unlisted: int = 0) -> Path:
    """A release in CARE's layout whose CSVs leave out the last `unlisted` names."""
    for split, names in (("train", train), ("test", test)):
        for name in names:
            write_npz(root / split / f"{split}_npz" / f"{name}.npz")
        (root / split).mkdir(parents=True, exist_ok=True)
        rows = "\n".join(f'{name},"[1, 2, 3, 4]"' for name in names[: len(names) - unlisted])
        (root / split / f"{split}_bbox.csv").write_text(f"name,bbox\n{rows}\n", encoding="utf-8")
    return root


NAMES = [f"case1000000{case}_slice{k}" for case in (2, 1) for k in (10, 9, 2)]


def test_slices_are_grouped_by_case_and_ordered_by_number(tmp_path: Path) -> None:
    store = open_store("rectum", make_release(tmp_path, [*NAMES, "1002"], ["77"]))
    assert [case["id"] for case in store.cases] == ["77", "1002", "case10000001", "case10000002"]
    assert store.cases[2]["slices"] == [f"case10000001_slice{k}" for k in (2, 9, 10)]
    assert store.classes == ["background", "normal rectum", "tumour"]
    assert store.index["orientation"] == "stored"


def test_training_uses_the_slices_the_csv_names_and_the_store_keeps_all(tmp_path: Path) -> None:
    root = make_release(tmp_path, NAMES, ["77", "78"], unlisted=1)
    store = open_store("rectum", root)
    listed = [store.cases[n]["slices"][k] for n, k in store.slices("train")]
    assert sorted(listed) == sorted(NAMES[:-1])
    assert sum(case["shape"][0] for case in store.cases if case["split"] == "train") == 6
    assert [build_dataset("rectum", "test", store=store)[0]["id"]] == ["77"]


def test_values_are_clipped_and_truncated_and_3_becomes_2(tmp_path: Path) -> None:
    image = np.array([[-0.2, 0.0, 0.5], [0.999, 1.0, 1.3]])
    label = np.array([[0.0, 1, 2], [3, 3, 0]])
    pixels, labels = read_slice(write_npz(tmp_path / "a.npz", image, label))
    assert pixels.tolist() == [[0, 0, 127], [254, 255, 255]]
    assert labels.tolist() == [[0, 1, 2], [2, 2, 0]]
    assert pixels.dtype == labels.dtype == np.uint8
    turned = read_slice(write_npz(tmp_path / "b.npz", np.asfortranarray(image), label))
    np.testing.assert_array_equal(turned[0], pixels)


def test_slices_of_a_case_in_two_sizes_become_two_entries(tmp_path: Path) -> None:
    root = make_release(tmp_path, ["case1_slice1", "case1_slice2"], [])
    big = np.zeros((20, 20))
    write_npz(root / "train/train_npz/case1_slice2.npz", big, big)
    store = open_store("rectum", root)
    assert [(c["id"], c["file"], c["shape"]) for c in store.cases] == [
        ("case1", "train_case1", [1, 16, 16]),
        ("case1", "train_case1_20x20", [1, 20, 20]),
    ]


def test_a_store_is_packed_once_and_again_when_the_source_changes(tmp_path: Path, capsys) -> None:
    root = make_release(tmp_path, NAMES, ["77"])
    first = open_store("rectum", root).digest
    assert "packing CARE" in capsys.readouterr().err
    stamp = (root / "packed" / "index.json").stat().st_mtime_ns
    assert open_store("rectum", root).digest == first
    assert (root / "packed" / "index.json").stat().st_mtime_ns == stamp
    assert "packing" not in capsys.readouterr().err

    changed = root / "test/test_npz/77.npz"
    write_npz(changed, label=np.ones((16, 16)))
    second = open_store("rectum", root)
    assert second.digest != first
    assert second.cases[0]["pixels"] == [[0, 256, 0]]

    os.utime(changed, ns=(1, 1))
    third = open_store("rectum", root).digest
    (root / "train/train_bbox.csv").write_text(
        CSV.format(f'{NAMES[0]},"[1,2,3,4]"'), encoding="utf-8"
    )
    fourth = open_store("rectum", root)
    assert len({first, second.digest, third, fourth.digest}) == 4
    assert len(fourth.slices("train")) == 1
    write_npz(root / "train/train_npz/new.npz")
    assert len(open_store("rectum", root).cases) == 4
    assert sorted(p.name for p in root.iterdir()) == ["packed", "test", "train"]


def test_processes_packing_at_once_agree(tmp_path: Path) -> None:
    root = make_release(tmp_path, NAMES, ["77"])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_store, args=("rectum", root)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(p.name for p in root.iterdir()) == ["packed", "test", "train"]


def test_a_damaged_store_is_packed_again(tmp_path: Path) -> None:
    root = make_release(tmp_path, NAMES, ["77"])
    first = open_store("rectum", root).digest
    (root / "packed" / "index.json").write_text("{", encoding="utf-8")
    assert open_store("rectum", root).digest == first


def test_a_failed_packing_leaves_nothing_behind(tmp_path: Path) -> None:
    root = make_release(tmp_path, NAMES, ["77"])
    write_npz(root / "test/test_npz/77.npz", label=np.full((16, 16), 9.0))
    with pytest.raises(ValueError, match=r"77\.npz: label ids 9"):
        open_store("rectum", root)
    assert sorted(p.name for p in root.iterdir()) == ["test", "train"]


def test_a_read_only_folder_is_packed_into_the_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_release(tmp_path / "care", NAMES, ["77"])
    root.chmod(0o555)
    try:
        store = open_store("rectum", root)
        assert store.folder.parent == tmp_path / "cache" / "u-sam"
        assert open_store("rectum", root).digest == store.digest
        assert not (root / "packed").exists()
    finally:
        root.chmod(0o755)


def test_a_linked_data_folder_is_followed(tmp_path: Path) -> None:
    make_release(tmp_path / "real", NAMES, ["77"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(open_store("rectum", tmp_path / "link").cases) == 3


def test_missing_data_names_folder_layout_and_phantom(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        build_dataset("rectum", "train", data_root=tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(tmp_path), "train/train_npz/NAME.npz", "--dataset phantom"):
        assert part in message


def test_a_missing_csv_and_a_missing_slice_are_named(tmp_path: Path) -> None:
    root = make_release(tmp_path, NAMES, ["77"])
    table = root / "train" / "train_bbox.csv"
    table.write_text(CSV.format('gone,"[1, 2, 3, 4]"'), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"train_bbox\.csv names 'gone'"):
        open_store("rectum", root)
    shutil.rmtree(root / "train" / "train_npz")
    with pytest.raises(FileNotFoundError, match=r"train_bbox\.csv names 'gone'"):
        open_store("rectum", root)
    make_release(root, NAMES, ["77"])
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"train_bbox\.csv is missing"):
        open_store("rectum", root)


@pytest.mark.parametrize(
    "text",
    [
        'name,bbox\r\n1002,"[131, 97, 155, 116]"\r\n',
        '1002,"[131, 97, 155, 116]"\n',
        '\ufeffid,box\n1002.npz,"(131.0, 97., 155, 1.16e2)"\n\n',
        "name,x1,y1,x2,y2\n1002,131,97,155,116\n",
        'n,b\n1002,"[131 97 155 116]"\n',
    ],
)
def test_csv_rows_are_a_name_and_four_numbers(tmp_path: Path, text: str) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(text.encode())
    assert read_boxes(table) == {"1002": (131, 97, 155, 116)}


@pytest.mark.parametrize(
    "row",
    [
        "1002,\"[__import__('pathlib').Path('canary').touch(), 1, 2, 3]\"",
        "1002,\"__import__('os').system('touch canary')\"",
        '1002,"[1, 2, 3]"',
        '1002,"[1, 2, 3, 4, 5]"',
        '1002,"[1, 2, 3, nan]"',
        '1002,"[1, 2, 3, 1e999]"',
        "1002",
        '/etc/passwd,"[1, 2, 3, 4]"',
        'C:/x,"[1, 2, 3, 4]"',
        '../1002,"[1, 2, 3, 4]"',
        'a/../1002,"[1, 2, 3, 4]"',
        'a/1002,"[1, 2, 3, 4]"',
        '10\0,"[1, 2, 3, 4]"',
        ',"[1, 2, 3, 4]"',
        "1002," + "9" * 200_000,
        '1002,"[1, 2, 3, \udcff]"',
    ],
)
def test_other_csv_rows_are_refused_by_file_and_nothing_runs(
    tmp_path: Path, row: str, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "t.csv"
    table.write_bytes(CSV.format(row).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"t\.csv"):
        read_boxes(table)
    assert not (tmp_path / "canary").exists()


def test_real_slices_match_the_recorded_statistics(
    shared_data: Path, recorded: Path, tmp_path: Path
) -> None:
    root = tmp_path / "care"
    shutil.copytree(shared_data / "care", root, copy_function=shutil.copyfile)
    for folder in [root, *filter(Path.is_dir, root.rglob("*"))]:
        folder.chmod(0o755)
    numbers = json.loads((recorded / "usam_data.json").read_text(encoding="utf-8"))
    seen = set()
    for split in ("train", "test"):
        dataset = build_dataset("rectum", split, data_root=root, val_fraction=0)
        for index, (number, k) in enumerate(dataset.slices):
            item, stored = dataset[index], dataset.store.read(number, k)[0]
            want, within = numbers["slices"][item["id"]], numbers["tolerance"]
            image = item["image"].double() / 255
            for key, value in (
                ("image_mean", image.mean()),
                ("image_std", image.std(correction=0)),
                ("image_min", image.min()),
                ("image_max", image.max()),
            ):
                assert value == pytest.approx(want[key], abs=within.get(key, 1e-4))
            assert stored.mean() == pytest.approx(want["uint8_before_clahe_mean"], abs=1e-6)
            assert stored.std() == pytest.approx(want["uint8_before_clahe_std"], abs=1e-6)
            assert (
                item["mask"].flatten().bincount(minlength=3).tolist()
                == want["mask_pixels_per_class"]
            )
            seen.add(item["id"])
    assert seen == {"1002", "4883", "4979"}
    batch = next(iter(DataLoader(dataset, batch_size=1, num_workers=1)))
    assert batch["image"].shape == (1, 1, 224, 224)
    assert batch["id"] == ["4979"]


def test_a_release_without_training_slices_still_evaluates(tmp_path: Path) -> None:
    root = make_release(tmp_path, [], ["77"])
    assert len(build_dataset("rectum", "test", data_root=root)) == 1
    with pytest.raises(FileNotFoundError, match="no train slices"):
        build_dataset("rectum", "train", data_root=root)


def test_names_of_other_shapes_are_their_own_case() -> None:
    assert rectum.case_of("case10000001_slice12") == ("case10000001", 12)
    assert rectum.case_of("1002") == ("1002", 0)
    assert rectum.case_of("case1_slice2_b") == ("case1_slice2_b", 0)
