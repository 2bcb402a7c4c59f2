"""Preparation: layouts found on disk, options, splits, faults, and going on after a kill."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset import build_dataset
from dataset.prepare.command import main
from dataset.splits import cross_validation, held_out
from dataset.store.slices import SliceStore
from tests.helpers import layouts

ROOT = Path(__file__).resolve().parents[2]


def prepare(source: str, root: Path, output: Path, *flags: str) -> SliceStore:
    arguments = [source, "--input", str(root), "--output", str(output), "--workers", "1", *flags]
    assert main(arguments) == 0
    return SliceStore(output)


def refused(capsys, *arguments: object) -> str:
    """What the command says on stderr before it ends with exit code 2."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--workers", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    return "\n".join(line for line in lines if "case/s" not in line)


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def places(store: SliceStore) -> dict[str, str]:
    return {case["id"]: case["split"] for case in store.cases}


@pytest.mark.parametrize(("suffix", "val"), [("", "Val"), ("_0000", "Va")])
@pytest.mark.parametrize("nested", [False, True])
def test_word_is_found_in_all_its_copies(tmp_path, suffix, val, nested):
    root = tmp_path / "in" / "WORD-V0.1.0" if nested else tmp_path / "in"
    layouts.word(root, {"Tr": [2, 4], "Val": [1], "Ts": [9]}, suffix=suffix, val=val)
    store = prepare("word", tmp_path / "in", tmp_path / "out")
    assert places(store) == {
        "word_0001": "val",
        "word_0002": "train",
        "word_0004": "train",
        "word_0009": "test",
    }
    assert store.classes[:2] == ["background", "liver"]
    assert store.index["window"] == [-160, 240]
    assert store.index["orientation"] == "LPS"
    assert store.cases[0]["spacing"] == pytest.approx([3, 2, 2])


def test_slices_are_upright_windowed_and_all_kept(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": [1]})
    image, label = layouts.scan(1)
    flipped = image[::-1, :, ::-1]  # stored with x to the Right and z to Inferior
    affine = layouts.AFFINE @ np.diag([-1, 1, -1, 1])
    affine[:3, 3] = -2 * (layouts.SHAPE[0] - 1), 0, 3 * (layouts.SHAPE[2] - 1)
    layouts.write(tmp_path / "in" / "imagesTr" / "word_0001.nii.gz", flipped, affine)
    store = prepare("word", tmp_path / "in", tmp_path / "out")
    wanted = np.clip(np.rint((image.astype(float) + 160) / 400 * 255), 0, 255)
    assert store.cases[0]["shape"] == [6, 20, 24]
    for k in range(6):
        stored, mask = store.read(0, k)
        np.testing.assert_array_equal(stored, wanted[:, :, k].T)
        np.testing.assert_array_equal(mask, label[:, :, k].T)
    assert store.cases[0]["pixels"][2] == np.bincount(label[:, :, 2].ravel()).tolist()
    assert store.cases[0]["slices"][2] == "word_0001_slice2"


def test_word_without_test_labels_says_what_is_left_out(tmp_path, capsys):
    layouts.word(tmp_path / "in", {"Tr": [1, 2], "Ts": [3]})
    (tmp_path / "in" / "labelsTs" / "word_0003.nii.gz").unlink()
    store = prepare("word", tmp_path / "in", tmp_path / "out")
    assert set(places(store).values()) == {"train"}
    assert "left out: 1 image without a label, first word_0003.nii.gz" in capsys.readouterr().out


V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}}
V2 = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "file_ending": ".nii.gz",
}


def test_nnunet_reads_both_versions_of_its_table(tmp_path):
    layouts.nnunet(tmp_path / "v1", V1)
    store = prepare("nnunet", tmp_path / "v1", tmp_path / "out1")
    assert store.classes == ["background", "liver", "tumour"]
    assert store.index["window"] == [-160, 240]
    layouts.nnunet(tmp_path / "v2", V2, channels=2)
    store = prepare("nnunet", tmp_path / "v2", tmp_path / "out2", "--channel", "1")
    assert store.classes == ["background", "liver", "tumour"]
    assert store.index["window"] == "percentile"
    assert store.cases[0]["range"][0] > -950  # channel 1 lies 100 higher


def test_nnunet_refuses_what_it_cannot_keep(tmp_path, capsys):
    for name, table, text in [
        ("regions", {**V1, "labels": {"background": 0, "whole": [1, 2]}}, "region labels.*whole"),
        ("ignore", {**V1, "labels": {"background": 0, "a": 1, "ignore": 2}}, "ignore label"),
        ("gap", {**V1, "labels": {"background": 0, "a": 2}}, "must be 0, 1, 2"),
        ("words", {**V1, "labels": {"background": 0, "a": "x"}}, "labels must be ids"),
        ("none", {"modality": {"0": "CT"}}, "not an nnU-Net dataset.json"),
        ("channels", V2, "several channels .0 T1, 1 T2.; choose one with --channel"),
    ]:
        root = layouts.nnunet(tmp_path / name, table)
        said = refused(capsys, "nnunet", "--input", root, "--output", tmp_path / "out")
        assert len(said.splitlines()) == 1
        assert re.search(text, said), said


def test_two_folders_are_paired_by_name(tmp_path):
    for number in (1, 2):
        image, label = layouts.scan(number, 3)
        layouts.write(tmp_path / "a" / f"p{number}.nii", image)
        layouts.write(tmp_path / "b" / f"p{number}.nii.gz", label.astype(np.float32))
    flags = ("--labels", str(tmp_path / "b"))
    store = prepare("folder", tmp_path / "a", tmp_path / "out", *flags)
    assert store.classes == ["background", "class 1", "class 2"]
    store = prepare(
        "folder", tmp_path / "a", tmp_path / "named", *flags, "--classes", "liver", "tumour"
    )
    assert store.classes == ["background", "liver", "tumour"]


def test_a_folder_of_dicom_series_is_a_scan(tmp_path, shared_data):
    series = tmp_path / "in" / "images" / "patient1"
    series.mkdir(parents=True)
    for path in (shared_data / "dicom").glob("*.dcm"):
        (series / path.name).write_bytes(path.read_bytes())
    label = tmp_path / "in" / "labels" / "patient1.nii.gz"
    label.parent.mkdir()
    label.write_bytes((shared_data / "dicom" / "liver1_spine2.nii.gz").read_bytes())
    store = prepare("folder", tmp_path / "in", tmp_path / "out", "--classes", "liver", "spine")
    counts = np.sum(store.cases[0]["pixels"], axis=0)
    assert store.cases[0]["shape"] == [3, 512, 512]
    assert (counts > 0).all()


def test_care_is_packed_as_released(tmp_path, capsys):
    layouts.care(
        tmp_path / "in", {"train": ["case1_slice0", "case1_slice1"], "test": ["case2_slice0"]}
    )
    store = prepare("care", tmp_path / "in", tmp_path / "out", "--seed", "1")
    assert places(store) == {"case1": "train", "case2": "test"}
    assert store.index["orientation"] == "stored"
    before = digest(tmp_path / "out")
    prepare("care", tmp_path / "in", tmp_path / "out")
    assert digest(tmp_path / "out") == before
    with pytest.raises(SystemExit, match="2"):
        main(["care", "--input", "a", "--output", "b", "--window", "0", "1"])
    assert "leave out --window" in capsys.readouterr().err


def test_spacing_and_crop_keep_millimetres(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": [1]})
    store = prepare("word", tmp_path / "in", tmp_path / "out", "--spacing", "4", "--body_crop")
    case = store.cases[0]
    assert store.index["spacing"] == 4
    assert case["spacing"][0] == pytest.approx(3)
    box = case["box"]
    assert case["shape"][1] * case["spacing"][1] == pytest.approx((box[1] - box[0]) * 2)
    corner = np.array(case["affine"]) @ [-0.5, -0.5, 0, 1]
    native = layouts.AFFINE @ [box[2] - 0.5, box[0] - 0.5, 0, 1]
    np.testing.assert_allclose(corner, native, atol=1e-5)


def test_splits_are_by_case_and_plain_json(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": [1, 2, 3, 4, 5], "Ts": [8]})
    prepare("word", tmp_path / "in", tmp_path / "out", "--folds", "5")
    table = json.loads((tmp_path / "out" / "splits.json").read_text(encoding="utf-8"))
    assert table["test"] == ["word_0008"]
    assert sorted(case for fold in table["folds"] for case in fold["val"]) == table["train"]
    assert all(not set(fold["train"]) & set(fold["val"]) for fold in table["folds"])
    assert cross_validation(list("cab"), 3, 7) == cross_validation(list("abc"), 3, 7)


def test_test_cases_are_held_out_on_request(tmp_path, capsys):
    layouts.nnunet(tmp_path / "in", V1, numbers=range(1, 6))
    store = prepare("nnunet", tmp_path / "in", tmp_path / "out", "--test_fraction", "0.4")
    assert sorted(places(store).values()) == ["test"] * 2 + ["train"] * 3
    assert held_out(["a", "b"], 0.5, 1) == set()
    layouts.word(tmp_path / "word", {"Tr": [1, 2], "Ts": [8]})
    said = refused(
        capsys,
        *("word", "--input", tmp_path / "word", "--output", tmp_path / "w"),
        *("--test_fraction", "0.5"),
    )
    assert "has test cases of its own" in said


def test_a_prepared_store_trains(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": [1, 2, 3, 4], "Ts": [8]})
    prepare("word", tmp_path / "in", tmp_path / "out")
    train = build_dataset("store", "train", data_root=tmp_path / "out", img_size=32)
    assert len(train) == 24
    assert train[0, 3]["image"].shape == (1, 32, 32)
    assert train.info["window"] == [-160, 240]
    assert build_dataset("word", "test", data_root=tmp_path / "out", img_size=32)[2]["mask"].any()


def label_fault(root: Path, array: np.ndarray, affine: np.ndarray = layouts.AFFINE) -> None:
    layouts.write(root / "labelsTr" / "word_0002.nii.gz", array, affine)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            lambda root, label: label_fault(root, label + np.uint8(1)),
            "ids 17 are outside the class table, 0 to 16",
        ),
        (lambda root, label: label_fault(root, label * 0.5), "not whole numbers: 0.5"),
        (lambda root, label: label_fault(root, label[:-1]), "shapes differ: 24 x 20 x 6 and 23"),
        (
            lambda root, label: label_fault(root, label, np.diag([2.0, 2.0, 3.0, 1.0])),
            "affines differ by .*--ignore_label_affine",
        ),
        (
            lambda root, label: (root / "imagesTr" / "word_0002.nii.gz").write_bytes(b"x"),
            "not a readable NIfTI",
        ),
    ],
)
def test_a_faulty_case_is_named_and_no_index_written(tmp_path, capsys, fault, text):
    layouts.word(tmp_path / "in", {"Tr": [1, 2]})
    fault(tmp_path / "in", layouts.scan(2)[1])
    said = refused(capsys, "word", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert "1 of 2 cases cannot be packed" in said
    assert re.search(text, said), said
    assert not (tmp_path / "out" / "index.json").exists()
    # Mended, the run goes on and ends like a run without the fault.
    layouts.word(tmp_path / "in", {"Tr": [1, 2]})
    prepare("word", tmp_path / "in", tmp_path / "out")
    prepare("word", tmp_path / "in", tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_a_label_of_another_affine_is_taken_on_request(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": [2]})
    label_fault(tmp_path / "in", layouts.scan(2)[1], np.eye(4))
    store = prepare("word", tmp_path / "in", tmp_path / "out", "--ignore_label_affine")
    np.testing.assert_array_equal(store.read(0, 2)[1], layouts.scan(2)[1][:, :, 2].T)


def test_bad_folders_and_flags_end_with_two(tmp_path, capsys):
    layouts.word(tmp_path / "in", {"Tr": [1], "Ts": [1]})
    out = ("--output", tmp_path / "out")
    assert "two cases of one id" in refused(capsys, "word", "--input", tmp_path / "in", *out)
    assert "no folder" in refused(capsys, "word", "--input", tmp_path / "none", *out)
    assert "no dataset.json" in refused(capsys, "nnunet", "--input", tmp_path / "in", *out)
    assert "images and labels below" in refused(capsys, "folder", "--input", tmp_path / "in", *out)
    layouts.word(tmp_path / "ok", {"Tr": [1]})
    ok = ("word", "--input", tmp_path / "ok")
    assert "in was not written by this program" in refused(capsys, *ok, "--output", tmp_path)
    assert "window x is not known" in refused(capsys, *ok, *out, "--window", "x")
    assert "--folds 3" in refused(capsys, *ok, *out, "--folds", "3")
    for flags in (["--spacing", "0"], ["--test_fraction", "1"], ["--labels", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, ok), *map(str, out), *flags])


def test_changed_options_and_sources_are_packed_again(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": [1, 2]})
    prepare("word", tmp_path / "in", tmp_path / "out")
    kept = (tmp_path / "out" / "cases" / "word_0001.image.npy").stat().st_mtime_ns
    prepare("word", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "cases" / "word_0001.image.npy").stat().st_mtime_ns == kept
    prepare("word", tmp_path / "in", tmp_path / "out", "--window", "bone")
    assert (tmp_path / "out" / "cases" / "word_0001.image.npy").stat().st_mtime_ns > kept
    prepare("word", tmp_path / "in", tmp_path / "fresh", "--window", "bone")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_no_name_from_a_header_reaches_the_store(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": [1]})
    path = tmp_path / "in" / "imagesTr" / "word_0001.nii.gz"
    image = nib.load(path)
    image.header["descrip"], image.header["db_name"] = b"DOE^JOHN", b"DOE^JOHN"
    image.header["aux_file"] = b"DOE^JOHN"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    assert b"DOE" in gzip.decompress(path.read_bytes())
    prepare("word", tmp_path / "in", tmp_path / "out")
    assert all(b"DOE" not in file.read_bytes() for file in (tmp_path / "out").rglob("*.*"))


def test_killed_runs_end_with_the_same_bytes(tmp_path):
    layouts.word(tmp_path / "in", {"Tr": range(1, 13), "Ts": [20, 21]})
    for path in (tmp_path / "in").glob("*/*"):  # large enough for a kill to find work
        array = np.asarray(nib.load(path).dataobj)
        layouts.write(path, np.kron(array, np.ones((8, 8, 4), array.dtype)))
    prepare("word", tmp_path / "in", tmp_path / "whole")
    rng, records = random.Random(0), tmp_path / ".out.next" / "new" / "cases"
    command = [sys.executable, "-m", "dataset.prepare", "word"]
    command += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    for workers in ("2", "1"):
        before = len(list(records.glob("*.json"))) if records.is_dir() else 0
        run = subprocess.Popen(
            [*command, "--workers", workers], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        while run.poll() is None and len(list(records.glob("*.json"))) <= before:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        os.kill(run.pid, signal.SIGKILL)  # the parent only: its workers must follow it
        run.wait()
    subprocess.run([*command, "--workers", "1"], cwd=ROOT, check=True, capture_output=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_real_word_volumes_become_a_store(tmp_path, shared_data):
    store = prepare("word", shared_data / "word", tmp_path / "out")
    assert places(store) == {"word_9001": "train", "word_9002": "test"}
    label = nib.load(shared_data / "word" / "labelsTs" / "word_9002.nii.gz")
    counts = np.bincount(np.asarray(label.dataobj).astype(int).ravel(), minlength=17)
    np.testing.assert_array_equal(np.sum(store.cases[1]["pixels"], axis=0), counts)
    # The liver lies on the patient's right, the spleen on the left: left and right of a slice.
    masks = np.stack([store.read(0, k)[1] for k in range(store.cases[0]["shape"][0])])
    liver, spleen = (np.argwhere(masks == organ)[:, 2].mean() for organ in (1, 2))
    assert liver < spleen


def test_a_store_that_is_made_otherwise_says_so_and_what_it_lacks(tmp_path, capsys):
    for name in ("images", "labels"):
        layouts.nnunet(tmp_path / "raw", {"labels": {"background": 0, "a": 1, "b": 2}})
        (tmp_path / "raw" / f"{name}Tr").rename(tmp_path / name)
    labels = ["--labels", str(tmp_path / "labels"), "--classes", "liver", "colon", "spleen"]
    images, out = tmp_path / "images", tmp_path / "out"
    for path in images.iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    prepare("folder", images, out, *labels, "--folds", "2")
    told = capsys.readouterr().out
    assert "no test cases, which --eval needs" in told
    assert "classes without a voxel: spleen" in told
    assert "replaces" not in told
    with pytest.raises(FileNotFoundError, match="no test slices in .* --test_fraction"):
        build_dataset("store", "test", data_root=out)
    prepare("folder", images, out, *labels, "--window", "bone")
    told = capsys.readouterr().out
    assert "replaces a store with another window" in told
    assert "the previous store's folds are gone" in told
    assert "error: folder: images and labels are the same folder" in refused(
        capsys, "folder", "--input", images, "--labels", images, "--output", tmp_path / "b"
    )
