"""Prediction: a label goes out where its voxel came in, whatever the scan's axes, size or type."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset.scans.slices import ScanSlices
from tests.helpers.oracle import (
    CODES,
    DEPTH,
    SIDE,
    STEP,
    WINDOW,
    Oracle,
    check_same_place,
    coded,
    data_of,
    lps_affine,
    predict,
    truth,
    turned,
    write,
)
from usam.prediction.overlay import spread_slices
from usam.prediction.results import count_voxels
from usam.prediction.slices import keep_largest, prepared, to_native


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
    label[0, 0, 0] = 2  # outside; a scan of one value is not shown to the model
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
    from dataset.prepare.command import main as prepare
    from dataset.slices import SliceDataset
    from dataset.store.slices import SliceStore
    from tests.helpers import layouts

    raw = layouts.word(tmp_path / "raw", {"Tr": [1]})
    for number, how in enumerate(([], ["--spacing", "1.5", "--clahe"], ["--window", "percentile"])):
        flags = ["word", "--input", str(raw), "--output", str(tmp_path / str(number)), *how]
        assert prepare([*flags, "--workers", "1"]) == 0
        store = SliceStore(tmp_path / str(number))
        slices = SliceDataset(store, store.slices("train"), img_size=32)
        scan = ScanSlices(raw / "imagesTr" / "word_0001.nii.gz", slices.info)
        for k in range(len(scan)):
            np.testing.assert_array_equal(scan.model_input(k), slices[k]["image"].numpy())


def test_a_scan_of_one_value_is_background_and_named(tmp_path):
    scan = write(tmp_path / "flat.nii", np.full((8, 8, 4), 7, np.int16), lps_affine())
    for window in (None, "percentile"):
        data, oracle = data_of(3, side=8), Oracle(3)
        result = predict(scan, tmp_path / "out", oracle, data, window=window, probabilities=True)
        assert not np.asarray(result.dataobj).any() and not oracle.shown
    facts = json.loads((tmp_path / "out" / "out_seg.json").read_text(encoding="utf-8"))
    assert facts["warnings"] == ["every voxel is 7; nothing to segment"]
    background = nib.load(tmp_path / "out" / "out_probabilities.nii").get_fdata()[..., 0]
    np.testing.assert_allclose(background, 1)


def test_a_scan_far_from_the_models_window_is_warned_of(tmp_path):
    hu = np.random.default_rng(0).normal(0, 300, (12, 12, 7))
    scan = write(tmp_path / "unit.nii", (hu / 3000 + 0.5).astype(np.float32), lps_affine())
    predict(scan, tmp_path / "out", Oracle(3), data_of(3))
    facts = json.loads((tmp_path / "out" / "out_seg.json").read_text(encoding="utf-8"))
    assert len(facts["warnings"]) == 1
    assert "the window -160 to 240 leaves" in facts["warnings"][0]
    assert "give --window LOW HIGH in the scan's units" in facts["warnings"][0]


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
    assert (told["orientation"], told["img_size"]) == ("LPS", 3 * SIDE)
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
    from usam.prediction import slices

    drawn = []
    monkeypatch.setattr(
        slices, "save_montage", lambda path, panels, **how: drawn.append(panels) or path.touch()
    )
    label = np.zeros((SIDE, SIDE, 14), dtype=np.uint8)
    for k, size in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0]):
        label[:size, 5, k] = 1
    scan = write(tmp_path / "a.nii", coded(label), lps_affine((2.0, 3.0, 1.0)))
    predict(scan, tmp_path / "out", Oracle(2), data_of(2), overlay=True)
    assert [panel.title for panel in drawn[0]] == [
        f"slice {k}" for k in (2, 4, 6, 7, 8, 9, 10, 11, 12)
    ]
    assert drawn[0][0].aspect == pytest.approx(1.5)
    np.testing.assert_array_equal(drawn[0][0].labels, label[:, :, 2].T)
    predict(write(tmp_path / "b.nii", coded(0 * label), lps_affine()), tmp_path / "out", Oracle(2),
            data_of(2, orientation="stored"), overlay=True)  # fmt: skip
    assert [panel.title for panel in drawn[1]] == ["slice 7"]
    np.testing.assert_array_equal(drawn[1][0].labels, 0 * label[:, :, 7].T)


def test_slices_with_prompts_are_drawn_and_look_alikes_are_not():
    foreground = np.zeros(140, dtype=int)
    foreground[72:140] = 100
    foreground[[90, 91]] = 200  # in two neighbouring ninths: the better of each
    chosen = spread_slices(foreground)
    assert len(chosen) == 9 and min(np.diff(chosen)) >= 5
    assert 80 in spread_slices(foreground, wanted=[80])
    assert set(range(20)) <= set(spread_slices(foreground, wanted=range(20)))


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
