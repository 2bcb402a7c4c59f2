"""Prediction: a label goes out where its voxel came in, whatever the scan's axes, size or type."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataset import DATASETS
from dataset.scan_slices import ScanSlices, find_scans, output_names
from tests.conftest import ROOT
from usam import checkpoint
from usam.engine import Precision
from usam.flags import parse_flags
from usam.model import build_usam
from usam.predict import Predictor, predict_scans, prepared, to_native
from usam.scan_output import count_voxels, keep_largest
from usam.scan_prompts import ScanPrompts, prompts_from_flags, read_prompts

WINDOW = (-160.0, 240.0)
STEP = 25  # HU between two classes of the oracle
SIDE, DEPTH = 12, 7
CODES = ["LPS", "RAS", "LAS", "RPS", "PIR", "SAL"]
ON_CPU = ("--device", "cpu", "--amp", "off")
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
    failed = predict_scans(
        [(scan, "out")], folder, Predictor(model, CPU, data, batch_size=3, **how),
        open_scan=lambda path: ScanSlices(path, data, window=window),
        prompts_for=lambda path: prompts or ScanPrompts(), facts={"checkpoint": "best.pth"},
    )  # fmt: skip
    if failed:
        raise failed[0][1]
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


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize("codes", CODES)
def test_an_oracle_gets_every_voxel_right_in_any_orientation(tmp_path, codes):
    label, affine = turned(truth(), lps_affine(), codes)
    scan = write(tmp_path / "scan.nii.gz", coded(label), affine)
    check_same_place(predict(scan, tmp_path / "out", Oracle(), data_of()), scan, label)


@pytest.mark.parametrize("zooms", [(0.7, 0.7, 5.0), (1.0, 2.0, 1.5)])
def test_an_oracle_gets_anisotropic_and_oblique_scans_right(tmp_path, zooms):
    angle = np.deg2rad(20)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    scan = write(tmp_path / "scan.nii", coded(truth()), tilt @ lps_affine(zooms))
    check_same_place(predict(scan, tmp_path / "out", Oracle(), data_of()), scan, truth())


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR"])
def test_an_oracle_gets_a_resampled_scan_right(tmp_path, codes):
    label, affine = turned(truth(), lps_affine(), codes)
    scan = write(tmp_path / "scan.nii.gz", coded(label), affine)
    data = data_of(spacing=2 / 3)  # grows to img_size by spacing alone
    check_same_place(predict(scan, tmp_path / "out", Oracle(), data), scan, label)


@pytest.mark.parametrize("codes", CODES)
def test_an_oracle_gets_a_real_scan_right(tmp_path, shared_data, codes):
    folder = shared_data / "word"
    image = nib.load(folder / "imagesTr" / "word_9001.nii.gz")
    label = np.asarray(nib.load(folder / "labelsTr" / "word_9001.nii.gz").dataobj).astype(np.uint8)
    side = max(label.shape[:2])  # squared by a rim, so that the oracle reads exact intensities
    rim = [(0, side - label.shape[0]), (0, side - label.shape[1]), (0, 0)]
    label, affine = turned(np.pad(label, rim), image.affine, codes)
    scan = write(tmp_path / "scan.nii.gz", coded(label), affine)
    result = predict(scan, tmp_path / "out", Oracle(), data_of(side=side))
    check_same_place(result, scan, label)
    assert len(np.unique(label)) == 15  # 14 organs are in it


def test_a_model_of_care_sees_transposed_slices_and_needs_a_window(tmp_path):
    label, affine = turned(truth(), lps_affine(), "RAS")
    scan = write(tmp_path / "scan.nii.gz", coded(label), affine)
    data, oracle = data_of(orientation="stored", window=None), Oracle()
    with pytest.raises(ValueError, match="no intensity window .* pass --window"):
        predict(scan, tmp_path / "out", oracle, data)
    result = predict(scan, tmp_path / "out", oracle, data, window=WINDOW)
    check_same_place(result, scan, label)
    shown = torch.cat([image for image, *_ in oracle.shown])[:, 0, 1::3, 1::3]
    expected = coded(truth()).transpose(2, 0, 1)  # slices, x, y of the LPS scan
    np.testing.assert_allclose(shown * 400 - 160, expected, atol=1)


def test_a_care_slice_is_read_on_its_own_scale(tmp_path):
    label = truth()[:, :, 3]
    np.savez(tmp_path / "7.npz", image=STEP * label.astype(float) / 400, label=label)
    data = data_of(orientation="stored", window=None)
    result = predict(tmp_path / "7.npz", tmp_path / "out", Oracle(), data, window=(-1.0, 1.0))
    np.testing.assert_array_equal(np.asarray(result.dataobj), label[:, :, None])
    rows = json.loads((tmp_path / "out" / "out_seg.json").read_text(encoding="utf-8"))["classes"]
    assert rows[1]["volume_ml"] is None
    with pytest.raises(ValueError, match="holds no HU"):
        predict(tmp_path / "7.npz", tmp_path / "out", Oracle(), data_of())


def test_outside_the_crop_is_background(tmp_path):
    label = np.ones((SIDE, SIDE, DEPTH), dtype=np.uint8)
    scan = write(tmp_path / "scan.nii", coded(label), lps_affine())
    data = data_of(side=SIDE - 4, crop=2 / SIDE)
    result = np.asarray(predict(scan, tmp_path / "out", Oracle(), data).dataobj)
    assert result[2:-2, 2:-2].all()
    assert result.sum() == (SIDE - 4) ** 2 * DEPTH


def test_a_probability_outside_the_box_is_background_for_certain():
    native = to_native(torch.randn(1, 3, 4, 4), (1, 5, 2, 6), (8, 9)).softmax(dim=1)
    assert native.shape == (1, 3, 8, 9)
    assert torch.equal(native[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert native[0, 0, 1:5, 2:6].max() < 1


def test_a_scan_is_prepared_as_the_dataset_prepares_its_store(tmp_path):
    from dataset.prepare import main as prepare
    from dataset.slice_dataset import SliceDataset
    from dataset.slices import SliceStore
    from tests import layouts

    raw = layouts.word(tmp_path / "raw", {"Tr": [1]})
    for number, how in enumerate(([], ["--spacing", "1.5", "--clahe"], ["--window", "percentile"])):
        flags = ["word", "--input", str(raw), "--output", str(tmp_path / str(number)), *how]
        assert prepare([*flags, "--workers", "1"]) == 0
        store = SliceStore(tmp_path / str(number))
        slices = SliceDataset(store, store.slices("train"), img_size=32)
        scan = ScanSlices(raw / "imagesTr" / "word_0001.nii.gz", slices.info)
        for k in range(len(scan)):
            np.testing.assert_array_equal(scan.model_input(k), slices[k]["image"].numpy())


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("orientation", ["LPS", "stored"])
def test_a_point_marks_its_own_voxel(tmp_path, codes, orientation):
    array, affine = turned(coded(truth()), lps_affine(), codes)
    scan = write(tmp_path / "scan.nii.gz", array, affine)
    voxel = [2, 5, 4]
    expected = np.zeros(array.shape, dtype=np.uint8)
    expected[tuple(voxel)] = 1
    data = data_of(2, orientation=orientation)
    millimetres = (affine @ [*voxel, 1])[:3].tolist()
    for given in (
        prompts_from_flags([voxel], None, None),
        prompts_from_flags([[*millimetres, 1.0]], None, None, mm=True),
    ):
        result = predict(scan, tmp_path / "o", Marker(), data, prompts=given, prompt_mode=2)
        np.testing.assert_array_equal(np.asarray(result.dataobj), expected)


@pytest.mark.parametrize(
    ("codes", "axis"), [("LPS", 2), ("RAS", 2), ("LAS", 2), ("PIR", 1), ("SAL", 0)]
)
def test_a_box_marks_its_voxels_along_the_axes_of_the_file(tmp_path, codes, axis):
    array, affine = turned(coded(truth()), lps_affine(), codes)
    scan = write(tmp_path / "scan.nii.gz", array, affine)
    given = prompts_from_flags(None, [[2, 3, 8, 5]], [4])
    expected = np.zeros(array.shape, dtype=np.uint8)
    np.moveaxis(expected, axis, 2)[2:9, 3:6, 4] = 1
    result = predict(scan, tmp_path / "o", Marker(), data_of(2), prompts=given, prompt_mode=1)
    np.testing.assert_array_equal(np.asarray(result.dataobj), expected)


def test_slices_without_a_prompt_stay_background(tmp_path):
    scan = write(tmp_path / "scan.nii", coded(np.full((SIDE, SIDE, DEPTH), 1)), lps_affine())
    given = prompts_from_flags([[1, 1, 2], [3, 3, 2, 0], [1, 1, 5]], None, None)
    oracle = Oracle(3)
    result = predict(
        scan, tmp_path / "o", oracle, data_of(3), prompts=given, prompt_mode=3, probabilities=True
    )
    assert np.flatnonzero(np.asarray(result.dataobj).any(axis=(0, 1))).tolist() == [2, 5]
    ((_, (coords, labels), boxes),) = oracle.shown
    assert labels.tolist() == [[1, 0, -1, -1, -1, -1], [1, -1, -1, -1, -1, -1]]
    assert coords[0, :2].tolist() == [[4, 4], [10, 10]]
    assert boxes.tolist() == [[0, 0, 36, 36]] * 2  # as training gives for an empty mask
    told = json.loads((tmp_path / "o" / "out_seg.json").read_text(encoding="utf-8"))
    assert told["prompted_slices"] == [2, 5]
    background = nib.load(tmp_path / "o" / "out_probabilities.nii").get_fdata()[..., 0]
    np.testing.assert_allclose(background[:, :, [0, 1, 3, 4, 6]], 1)


def test_a_published_model_gets_row_and_column(tmp_path):
    scan, oracle = write(tmp_path / "a.nii", coded(truth()), lps_affine()), Oracle(2)
    given = prompts_from_flags([[1, 7, 2]], None, None)
    how = {"prompts": given, "prompt_mode": 2, "points_are_row_col": True}
    predict(scan, tmp_path / "o", oracle, data_of(2), **how)
    assert oracle.shown[0][1][0][0, 0].tolist() == [7 * 3 + 1, 1 * 3 + 1]


@pytest.mark.parametrize(
    ("mode", "points", "boxes", "slices", "text"),
    [
        (0, [[1, 1, 1]], None, None, "trained without prompts"),
        (1, None, None, None, "trained with prompts: boxes; give --box and --slice"),
        (2, None, None, None, "trained with prompts: points; give --point"),
        (3, None, None, None, "points and boxes; give --point and --box"),
        (1, [[1, 1, 1]], None, None, "it takes no points"),
        (2, None, [[1, 1, 2, 2]], [1], "it takes no boxes"),
        (2, [[1, 1, DEPTH]], None, None, r"voxel \(1, 1, 7\) is outside 12 x 12 x 7 voxels"),
        (1, None, [[1, 1, 2, 2]], [-1], "a slice is an index of 0 or more"),
        (1, None, [[1, 1, 2, 2]], None, "has 7 slices; give each --box a --slice"),
        (1, None, [[5, 1, 2, 2]], [1], "x1 <= x2"),
        (1, None, [[1, 1, 2, 2]] * 2, [1, 1], "two boxes on slice 1"),
        (2, [[1, 1, 1, 2]], None, None, "label is 1 .object. or 0"),
        (2, [[1, 1]], None, None, "a point is x y z"),
        (2, [[1, 1, float("nan")]], None, None, "a point is x y z"),
    ],
)
def test_wrong_prompts_are_told_in_one_line(tmp_path, mode, points, boxes, slices, text):
    scan = write(tmp_path / "a.nii", coded(truth()), lps_affine())
    with pytest.raises(ValueError, match=text) as error:
        given = prompts_from_flags(points, boxes, slices)
        predict(scan, tmp_path / "o", Marker(), data_of(2), prompts=given, prompt_mode=mode)
    assert "\n" not in str(error.value)
    assert not list((tmp_path).glob("o/*"))


def test_prompts_come_from_a_file_too(tmp_path):
    file = tmp_path / "prompts.json"
    one = {"points": [[1, 2, 3], [4, 5, 6, 0]], "boxes": [{"slice": 2, "box": [1, 2, 3, 4]}]}
    expected = ScanPrompts(
        points=((1.0, 2.0, 3.0, 1), (4.0, 5.0, 6.0, 0)), boxes=((2, 1.0, 2.0, 3.0, 4.0),)
    )
    file.write_text(json.dumps(one), encoding="utf-8")
    assert read_prompts(file, "any.nii.gz") == expected
    file.write_text(
        json.dumps({"scans": {"a.nii.gz": one, "b.nii": {"mm": True}}}), encoding="utf-8"
    )
    assert read_prompts(file, "a.nii.gz") == expected
    assert read_prompts(file, "b.nii") == ScanPrompts(mm=True)
    with pytest.raises(ValueError, match="names no scan 'c.nii'"):
        read_prompts(file, "c.nii")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"point": []}', '{"boxes": [[1]]}', '{"points": {}}', "[" * 100000, "\xff"]
)
def test_a_file_of_something_else_is_told_in_one_line(tmp_path, text):
    file = tmp_path / "prompts.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="prompts.json") as error:
        read_prompts(file, "a.nii")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ what is written


def test_the_json_tells_classes_and_millilitres(tmp_path):
    scan = write(tmp_path / "Doe^Jane.nii.gz", coded(truth()), lps_affine((2.0, 2.5, 4.0)))
    predict(scan, tmp_path / "out", Oracle(), data_of(colors=["#000000", "#ff0000"] + [None] * 15))
    told = json.loads((tmp_path / "out" / "out_seg.json").read_text(encoding="utf-8"))
    row = told["classes"][1]
    assert (row["id"], row["name"], row["color"]) == (1, "organ 1", "#ff0000")
    assert row["voxels"] == np.count_nonzero(truth() == 1)
    assert row["volume_ml"] == pytest.approx(row["voxels"] * 20 / 1000)
    assert len(told["classes"]) == 17
    assert sum(row["voxels"] for row in told["classes"]) == truth().size
    assert told["checkpoint"] == "best.pth"
    assert told["window"] == list(WINDOW)
    assert str(tmp_path) not in json.dumps(told)


@pytest.mark.parametrize("codes", ["LPS", "PIR"])
def test_probabilities_lie_where_the_labels_do(tmp_path, codes):
    label, affine = turned(truth(3), lps_affine(), codes)
    scan = write(tmp_path / "scan.nii.gz", coded(label), affine)
    predict(scan, tmp_path / "out", Oracle(3), data_of(3), probabilities=True)
    image = nib.load(tmp_path / "out" / "out_probabilities.nii")
    np.testing.assert_array_equal(image.affine, nib.load(scan).affine)
    values = image.get_fdata()
    assert values.shape == (*label.shape, 3)
    np.testing.assert_array_equal(values.argmax(axis=-1), label)
    np.testing.assert_allclose(values.sum(axis=-1), 1, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "out_probabilities.nii", "out_seg.json", "out_seg.nii.gz",
    ]  # fmt: skip


def test_the_largest_piece_of_each_class_is_kept():
    label = np.zeros((8, 8, 8), dtype=np.uint8, order="F")
    label[0:3, 0:3, 0:3] = 1
    label[3, 3, 3] = 1  # touches by a corner
    label[6, 6, 6] = label[0, 7, 0] = 1
    label[5:7, 0:2, 0:2] = 2
    label[5, 5, 0] = 2
    keep_largest(label)
    assert count_voxels(label, 4).tolist() == [512 - 28 - 8, 28, 8, 0]
    assert label[3, 3, 3] == 1 and label[6, 6, 6] == 0 and label[5, 5, 0] == 0


def test_a_montage_spreads_over_the_foreground_and_shows_most_of_it(tmp_path, monkeypatch):
    from usam import scan_output

    seen = []
    monkeypatch.setattr(
        scan_output, "save_montage", lambda path, numbers, *_, **how: seen.append((numbers, how))
    )
    label = np.zeros((SIDE, SIDE, 14), dtype=np.uint8)
    for k, size in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0]):
        label[:size, 5, k] = 1
    scan = write(tmp_path / "a.nii", coded(label), lps_affine((2.0, 3.0, 1.0)))
    predict(scan, tmp_path / "out", Oracle(2), data_of(2), overlay=True)
    predict(write(tmp_path / "a.nii", coded(0 * label), lps_affine()), tmp_path / "out", Oracle(2),
            data_of(2, orientation="stored"), overlay=True)  # fmt: skip
    assert seen[0][0] == [2, 4, 6, 7, 8, 9, 10, 11, 12]
    assert seen[0][1]["aspect"] == pytest.approx(1.5)
    assert seen[1][0] == [7] and seen[1][1]["transpose"]


def test_batches_are_in_order_and_prepared_only_a_little_ahead():
    class Counting:
        def __init__(self) -> None:
            self.asked = 0

        def model_input(self, k: int) -> np.ndarray:
            self.asked += 1
            return np.full((1, 2, 2), k, dtype=np.uint8)

    scan, seen = Counting(), []
    for numbers, images in prepared(scan, list(range(50)), 4, threads=2):
        seen += numbers
        assert images[:, 0, 0, 0].tolist() == list(numbers)
        assert scan.asked <= len(seen) + 2 * 4
    assert seen == list(range(50))


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a vit_tiny checkpoint with the given `data`; its path."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(**other: object) -> Path:
        data = data_of(3, **{"img_size": 32, "prompt_mode": 0, **other})
        path = folder / f"{len(list(folder.iterdir()))}.pth"
        model = build_usam("vit_tiny", num_classes=3, img_size=32)
        checkpoint.save(
            path,
            {"format": 1, "model": model.state_dict(), "args": {"sam_model": "vit_tiny"},
             "data": data, "progress": {}, "best": {}},
        )  # fmt: skip
        return path

    return make


@pytest.fixture(scope="module")
def command() -> Callable[..., None]:
    """u-sam.py's main, called with a command line."""
    spec = importlib.util.spec_from_file_location("u_sam", ROOT / "u-sam.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main(parse_flags(DATASETS, [str(word) for word in words]))


def test_one_bad_scan_does_not_stop_the_others(tmp_path, tiny):
    good = [write(tmp_path / f"{n}.nii.gz", coded(truth()), lps_affine()) for n in "ab"]
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(good[0].read_bytes()[:200])
    words = ["--predict", good[0], bad, tmp_path / "none.nii", good[1], "--resume", tiny()]
    done = subprocess.run(
        [sys.executable, ROOT / "u-sam.py", *words, "--output_dir", tmp_path / "out",
         *ON_CPU, "--overlay", "--largest_component", "--num_workers", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 3 and "bad.nii.gz" in done.stderr and "none.nii: no such" in done.stderr
    assert errors[-1].endswith("2 of 4 scans were not segmented, see above")
    assert "Traceback" not in done.stderr
    names = [f"{n}_{end}" for n in "ab" for end in ("overlay.png", "seg.json", "seg.nii.gz")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    image = nib.load(tmp_path / "out" / "a_seg.nii.gz")
    assert image.shape == (SIDE, SIDE, DEPTH) and image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, nib.load(good[0]).affine)


def odd_scans() -> dict[str, tuple[np.ndarray, np.ndarray, str | None]]:
    """Odd but honest scans, and broken ones with what is said of them."""
    hu, affine = coded(truth()), lps_affine()
    nan = hu.astype(np.float32)
    nan[0, 0, 0] = np.nan
    angle = np.eye(4)
    angle[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    return {
        "int32": (hu.astype(np.int32), affine, None),
        "float64": (hu.astype(np.float64), affine, None),
        "uint8": (truth(), affine, None),
        "one_slice": (hu[:, :, :1], affine, None),
        "one_column": (hu[:1], affine, None),
        "oblique": (hu, angle @ affine, None),
        "permuted": (*turned(hu, affine, "SAR"), None),
        "no_foreground": (np.full_like(hu, -1000), affine, None),
        "4d_of_one": (hu[..., None], affine, None),
        "4d": (np.stack([hu, hu], axis=3), affine, "holds 2 channels; choose one with --channel"),
        "2d": (hu[:, :, 0], affine, "a 2D image"),
        "nan": (nan, affine, "1 voxels are NaN or infinite"),
        "flat_affine": (hu, np.diag([0.0, 1, 1, 1]), "not finite and invertible"),
    }


@pytest.mark.parametrize("name", list(odd_scans()))
def test_an_odd_scan_works_or_is_told_in_one_line(tmp_path, tiny, command, name):
    array, affine, text = odd_scans()[name]
    image = nib.Nifti1Image(array, None)
    image.header.set_sform(affine, code=1)
    image.header["pixdim"][1:4] = 1
    nib.save(image, tmp_path / "odd.nii.gz")
    words = ["--predict", tmp_path / "odd.nii.gz", "--resume", tiny(), *ON_CPU]
    words += ["--output_dir", tmp_path / "out", "--probabilities", "--overlay"]
    if text is None:
        command(*words)
        result = nib.load(tmp_path / "out" / "odd_seg.nii.gz")
        assert result.shape == array.shape[:3]
        np.testing.assert_array_equal(result.affine, nib.load(tmp_path / "odd.nii.gz").affine)
        return
    with pytest.raises(ValueError, match=text) as error:
        command(*words)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_channel_of_a_4d_scan_is_chosen_by_its_flag(tmp_path, tiny, command):
    array = np.stack([coded(truth())] * 2, axis=3)
    scan = write(tmp_path / "a.nii", array, lps_affine())
    words = ["--predict", scan, "--resume", tiny(), *ON_CPU, "--channel", 1]
    command(*words, "--output_dir", tmp_path / "out")
    assert nib.load(tmp_path / "out" / "a_seg.nii.gz").shape == (SIDE, SIDE, DEPTH)


def test_a_prompted_model_says_so_and_takes_prompts(tmp_path, tiny, command):
    scan = write(tmp_path / "a.nii", coded(truth()), lps_affine())
    words = ["--predict", scan, "--resume", tiny(prompt_mode=3), *ON_CPU]
    words += ["--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="give --point and --box"):
        command(*words)
    command(*words, "--point", 3, 4, 2, "--box", 1, 2, 8, 9, "--slice", 2)
    told = json.loads((tmp_path / "out" / "a_seg.json").read_text(encoding="utf-8"))
    assert told["prompted_slices"] == [2]
    with pytest.raises(ValueError, match="--box and --point mark one scan"):
        command(*words[:2], scan, *words[2:], "--point", 3, 4, 2)


@pytest.mark.parametrize(
    "words",
    [
        "--predict a.nii",
        "--predict a.nii --resume x --eval",
        "--overlay --resume x",
        "--predict a.nii --resume x --box 1 2 3 4 --slice 1 --slice 2",
        "--predict a.nii --resume x --mm",
        "--predict a.nii --resume x --point 1 2",
        "--predict a.nii --resume x --point 1 2 3 --prompts p.json",
    ],
)
def test_flags_that_do_not_fit_together_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(DATASETS, words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_folders_name_series_or_the_scans_in_them(tmp_path):
    series, scans = tmp_path / "series", tmp_path / "scans"
    series.mkdir()
    scans.mkdir()
    (series / "1").write_bytes(bytes(128) + b"DICM")
    for name in ("b.nii.gz", "a.nrrd", ".hidden.nii", "notes.txt"):
        (scans / name).touch()
    (series / "label.nii.gz").touch()
    assert find_scans([series, scans, tmp_path / "none"]) == [
        series, scans / "a.nrrd", scans / "b.nii.gz", tmp_path / "none",
    ]  # fmt: skip


def test_results_of_scans_with_one_name_stay_apart():
    scans = [Path(p) for p in ("/x/1/ct.nii.gz", "/x/2/ct.nii.gz", "/y/2/ct.nii", "/x/mr.nii")]
    assert output_names(scans) == ["1_ct", "2_ct", "2_ct_2", "mr"]


def test_real_dicom_and_nifti_of_one_series_agree(tmp_path, shared_data, tiny, command):
    pytest.importorskip("SimpleITK")
    folder = shared_data / "dicom"
    words = ["--resume", tiny(), *ON_CPU, "--output_dir", tmp_path]
    command("--predict", folder, folder / "ct.nii.gz", *words)
    series = nib.load(tmp_path / "dicom_seg.nii.gz")
    nifti = nib.load(tmp_path / "ct_seg.nii.gz")
    assert series.shape == (512, 512, 3)
    np.testing.assert_array_equal(nifti.affine, nib.load(folder / "ct.nii.gz").affine)
    lps = [nib.as_closest_canonical(image) for image in (series, nifti)]
    np.testing.assert_allclose(lps[0].affine, lps[1].affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(lps[0].dataobj), np.asarray(lps[1].dataobj))
