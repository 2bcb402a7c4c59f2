"""SAM-Med3D's geometry: recorded numbers, any orientation alike, exact ways back, placed cubes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset.crops import box_origin, click_origin, crop_at, crop_reader, normalise, overlap
from dataset.scans.read import read_label
from dataset.scans.volumes import ScanVolume, grid_of, read_label_volume, read_volume
from tests.helpers.volume_layouts import blob, save_as, stored_as

SCANS = {
    "aorta_0001": "volumes/aorta/ct_totalseg/{}Tr/aorta_0001.nii.gz",
    "ts512_0002": "word/{}Ts/word_9002.nii.gz",
}


@pytest.fixture(scope="module")
def geometry(recorded: Path) -> dict:
    return json.loads((recorded / "sam_med3d_inference_geometry.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=SCANS)
def case(request, shared_data: Path, geometry: dict) -> tuple:
    """(recorded numbers by label, volume, label at 1.5 mm, label as stored)."""
    paths = [shared_data / SCANS[request.param].format(kind) for kind in ("images", "labels")]
    scan = read_volume(paths[0])
    label = read_label_volume(paths[1], scan.grid)
    return geometry[request.param]["per_label"], scan, label, read_label(paths[1]).array


def test_recorded_volumes(case) -> None:
    numbers, scan, label, _ = case
    for number, wanted in numbers.items():
        assert list(scan.image.shape) == wanted["canonical_shape_xyz"]
        np.testing.assert_allclose(scan.affine, wanted["canonical_affine"], atol=1e-5)
        assert scan.image.dtype == np.int16
        assert scan.image.min() == wanted["resampled_image_min"]
        assert scan.image.max() == wanted["resampled_image_max"]
        total = scan.image.sum(dtype=np.int64)
        assert abs(total - wanted["resampled_image_sum"]) < 0.02 * scan.image.size
        found = np.argwhere(label == int(number))
        assert len(found) == wanted["label_voxels_resampled"]
        assert found.min(axis=0).tolist() == wanted["bbox_min"]
        assert (found.max(axis=0) + 1).tolist() == wanted["bbox_max_exclusive"]


def test_recorded_crops(case) -> None:
    numbers, scan, label, _ = case
    for number, wanted in numbers.items():
        origin = box_origin(wanted["bbox_min"], wanted["bbox_max_exclusive"], 128)
        assert origin.tolist() == wanted["roi_origin_in_canonical"]
        placed = scan.affine @ [*origin, 1]
        np.testing.assert_allclose(placed[:3], np.array(wanted["roi_affine"])[:3, 3], atol=1e-5)
        crop = crop_at(scan.image, origin, 128)
        counted = crop[crop > 0].astype(np.float64)
        assert abs(len(counted) - wanted["roi_voxels_gt0"]) <= 20
        assert counted.mean() == pytest.approx(wanted["roi_mean_gt0"], abs=0.02)
        assert counted.std(ddof=1) == pytest.approx(wanted["roi_std_gt0_unbiased"], abs=0.02)
        assert crop_at(label == int(number), origin, 128).sum() == wanted["roi_label_voxels"]


def test_recorded_normalised_values(case) -> None:
    numbers, scan, _, _ = case
    for wanted in numbers.values():
        crop = crop_at(scan.image, wanted["roi_origin_in_canonical"], 128)
        values = normalise(torch.from_numpy(crop)[None, None])[0, 0].numpy()
        for place, value in wanted["norm_samples"].items():
            index = tuple(int(part) for part in place.split(","))
            assert values[index] == pytest.approx(value, abs=2e-4), place
        np.testing.assert_allclose(
            values[64, 64, ::4], wanted["norm_line_x64_y64_z_step4"], atol=1e-2
        )
        assert values.min() == pytest.approx(wanted["norm_min"], abs=1e-3)
        assert values.max() == pytest.approx(wanted["norm_max"], abs=1e-3)


def test_recorded_round_trips(case) -> None:
    numbers, scan, label, stored = case
    for number, wanted in numbers.items():
        origin, back = wanted["roi_origin_in_canonical"], wanted["postprocess_roundtrip"]
        whole = np.zeros(label.shape, dtype=np.uint8)
        inside, own = overlap(origin, 128, label.shape)
        whole[inside] = crop_at(label == int(number), origin, 128)[own]
        found = scan.restore(whole) > 0
        assert found.shape == tuple(back["shape_zyx"][::-1])
        assert found.sum() == back["voxels"]
        assert (found & (stored == int(number))).sum() == back["intersection"]


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.8, 0.8, 3.0), (1.1, 2.3, 1.0)])
def test_any_orientation_gives_the_same_volume(tmp_path: Path, spacing) -> None:
    shape = tuple(round(45 / mm) for mm in spacing)
    drawn = blob(shape, spacing)
    wanted = None
    for codes in ("RAS", "LPS", "LAS", "SPL", "PIR"):
        paths = save_as(tmp_path, codes, *drawn)
        scan = read_volume(paths[0])
        label = read_label_volume(paths[1], scan.grid)
        wanted = wanted or (scan.image, label, scan.affine)
        np.testing.assert_array_equal(scan.image, wanted[0])
        np.testing.assert_array_equal(label, wanted[1])
        np.testing.assert_allclose(scan.affine, wanted[2], atol=1e-5)
        assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")


def test_a_finer_copy_gives_the_same_volume(tmp_path: Path) -> None:
    image, label, affine = blob((30, 30, 30), (1.5, 1.5, 1.5))
    fine = [np.repeat(np.repeat(array, 2, axis=2), 3, axis=0) for array in (image, label)]
    finer = affine @ np.diag([1 / 3, 1, 1 / 2, 1])
    finer[:3, 3] = affine[:3, 3] + affine[:3, :3] @ [-1 / 3, 0, -1 / 4]
    paths = save_as(tmp_path, "LPS", *fine, finer)
    scan = read_volume(paths[0])
    np.testing.assert_array_equal(scan.image, image)
    np.testing.assert_array_equal(read_label_volume(paths[1], scan.grid), label)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL"])
@pytest.mark.parametrize("spacing", [(0.7, 0.7, 0.9), (0.8, 0.8, 3.0), (2.2, 2.0, 5.0)])
def test_a_label_comes_back_as_well_as_resampling_allows(tmp_path: Path, codes, spacing) -> None:
    shape = tuple(round(45 / mm) for mm in spacing)
    image, label, affine = blob(shape, spacing)
    paths = save_as(tmp_path, codes, image, label, affine)
    scan, stored = read_volume(paths[0]), read_label(paths[1])
    volume = read_label_volume(paths[1], scan.grid)
    back = scan.restore(volume)
    assert back.shape == stored.array.shape
    # The limit of resampling: each voxel's place in the volume looked up by world coordinates.
    world = nib.affines.apply_affine(
        scan.grid.header.affine, np.indices(back.shape).reshape(3, -1).T
    )
    index = np.rint(nib.affines.apply_affine(np.linalg.inv(scan.affine), world)).astype(int)
    index = np.clip(index, 0, np.array(volume.shape) - 1)
    limit = volume[tuple(index.T)].reshape(back.shape)
    for number in (1, 2):
        assert dice(back == number, limit == number) > 0.99
        assert dice(back == number, stored.array == number) > 0.8


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def test_a_saved_label_lies_on_the_scan(tmp_path: Path) -> None:
    paths = save_as(tmp_path, "PIR", *blob((40, 50, 20), (1.1, 0.9, 2.0)))
    scan = read_volume(paths[0])
    scan.save(tmp_path / "out.nii.gz", read_label_volume(paths[1], scan.grid))
    saved, image = nib.load(tmp_path / "out.nii.gz"), nib.load(paths[0])
    assert saved.shape == image.shape
    np.testing.assert_array_equal(saved.affine, image.affine)
    np.testing.assert_array_equal(
        np.asarray(saved.dataobj), scan.restore(read_label_volume(paths[1], scan.grid))
    )


def test_clicks_follow_the_scan_into_the_volume(tmp_path: Path) -> None:
    image, label, affine = blob((30, 40, 20), (1.3, 0.9, 2.5))
    paths = save_as(tmp_path, "PIR", image, label, affine)
    scan = read_volume(paths[0])
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(scan.grid.header.shape) - 1)
    points = np.concatenate([corners, [[3, 4, 5], [12, 9, 21]]])
    mm = nib.affines.apply_affine(scan.grid.header.affine, points)
    for found in (scan.clicks(points), scan.clicks(mm, mm=True)):
        placed = nib.affines.apply_affine(scan.affine, found)
        assert np.abs(placed - mm).max() <= 0.75 + 1e-4
    # A label drawn at a click is found there again.
    one = np.zeros(scan.image.shape, dtype=np.uint8)
    one[tuple(scan.clicks(points[-1])[0])] = 1
    assert scan.restore(one)[tuple(points[-1])] == 1


@pytest.mark.parametrize(
    ("point", "mm"), [((30, 0, 0), False), ((0, -1, 0), False), ((0, 0, 9), True)]
)
def test_a_click_outside_is_refused(tmp_path: Path, point, mm) -> None:
    paths = save_as(tmp_path, "RAS", *blob((30, 40, 20), (1.3, 0.9, 2.5)))
    with pytest.raises(ValueError, match=r"click .* lies outside .*RAS_image.nii.gz"):
        read_volume(paths[0]).clicks([point], mm=mm)


def test_a_slice_or_several_channels_are_refused(tmp_path: Path) -> None:
    for name, shape, text in (
        ("flat", (20, 20), "2D image"),
        ("slice", (20, 20, 1), "single slice"),
        ("two", (20, 20, 5, 2), "2 volumes"),
    ):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / f"{name}.nii")
        with pytest.raises(ValueError, match=text):
            read_volume(tmp_path / f"{name}.nii")
    assert read_volume(tmp_path / "two.nii", channel=1).image.shape == (14, 14, 4)


def test_a_label_elsewhere_is_refused(tmp_path: Path) -> None:
    image, label, affine = blob((30, 40, 20), (1.5, 1.5, 1.5))
    paths = save_as(tmp_path, "RAS", image, label, affine)
    moved = affine + np.eye(4, k=3) * 9
    nib.save(stored_as(label, moved, "RAS"), paths[1])
    with pytest.raises(ValueError, match="does not lie on RAS_image.nii.gz"):
        read_label_volume(paths[1], read_volume(paths[0]).grid)


def test_sizes_and_values_by_hand(tmp_path: Path) -> None:
    image = np.zeros((4, 4, 4), dtype=np.float32)
    image[:, :, :] = np.arange(4)[:, None, None] * 10
    path = tmp_path / "ramp.nii"
    nib.save(nib.Nifti1Image(image, np.diag([1.0, 1.5, 1.5, 1.0])), path)
    scan = read_volume(path)
    # 4 voxels of 1 mm: ceil(4 / 1.5) = 3; from the LPS corner, that is from x = 3, sampled at
    # 0.25, 1.75 and 3.25 (beyond the last centre, within the last voxel: clamped).
    assert scan.image.shape == (3, 4, 4)
    assert scan.image.dtype == np.float32
    np.testing.assert_allclose(scan.image[:, 0, 0], [0, 12.5, 27.5], atol=1e-5)


def test_a_voxel_centred_outside_is_zero(tmp_path: Path) -> None:
    image = np.full((5, 4, 4), 100, dtype=np.int16)  # 5 mm: 4 voxels, the last at 4.75 of 4.5
    nib.save(nib.Nifti1Image(image, np.diag([-1.0, -1.5, 1.5, 1.0])), tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").image[:, 0, 0].tolist() == [0, 100, 100, 100]


def test_a_float32_affine_adds_no_voxel(tmp_path: Path) -> None:
    affine = np.diag([1.5000001, 1.5000002, 1.5, 1])
    nib.save(nib.Nifti1Image(np.zeros((12, 10, 8), np.int16), affine), tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").image.shape == (12, 10, 8)


def test_normalise_counts_voxels_above_zero() -> None:
    crops = torch.tensor([[-1000, 0, 10, 30], [0, 0, 0, 0], [0, 0, 7, 7]]).view(3, 1, 1, 2, 2)
    values = normalise(crops.to(torch.int16))
    spread = 2**0.5 * 10  # unbiased, of 10 and 30
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0].flatten(), torch.tensor([-1020, -20, -10, 10]) / spread)
    assert values[1].abs().max() == 0
    assert values[2].flatten().tolist() == [-7, -7, 0, 0]


def test_each_crop_is_normalised_by_itself() -> None:
    crops = torch.rand(3, 1, 8, 8, 8) * torch.tensor([1.0, 50, 900]).view(3, 1, 1, 1, 1)
    together = normalise(crops)
    for index in range(3):
        torch.testing.assert_close(together[index : index + 1], normalise(crops[index : index + 1]))


def test_cubes_are_cut_and_set_back() -> None:
    volume = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7) + 1
    for origin in ([0, 0, 0], [-3, 2, 5], [4, -7, 1], [3, 3, 3], [9, 0, 0], [-8, 0, 0]):
        crop = crop_at(volume, origin, 8)
        inside, own = overlap(origin, 8, volume.shape)
        back = np.zeros_like(volume)
        back[inside] = crop[own]
        for place in np.ndindex(volume.shape):
            held = all(0 <= place[axis] - origin[axis] < 8 for axis in range(3))
            assert back[place] == (volume[place] if held else 0)
        assert np.count_nonzero(crop) == np.count_nonzero(back)


def test_a_reader_gives_normalised_crops() -> None:
    volume = np.random.default_rng(0).integers(-100, 100, (20, 9, 12), dtype=np.int16)
    wanted = normalise(torch.from_numpy(crop_at(volume, (-2, 3, 4), 16))[None, None])
    torch.testing.assert_close(crop_reader(volume)((-2, 3, 4), 16), wanted, rtol=0, atol=0)


def test_places_of_boxes_and_clicks() -> None:
    assert box_origin([10, 20, 30], [13, 24, 30 + 129], 128).tolist() == [-53, -42, 30]
    assert click_origin([[40, 50, 60]], 64).tolist() == [8, 18, 28]
    assert click_origin([[40, 50, 60], [50, 50, 60]], 64).tolist() == [13, 18, 28]
    assert click_origin([[40, 50, 60], [140, 50, 60]], 64).tolist() == [8, 18, 28]
    with pytest.raises(ValueError, match="at least one click"):
        click_origin([], 64)


def test_a_click_is_in_its_cube() -> None:
    rng = np.random.default_rng(0)
    for clicks in rng.integers(0, 50, (20, 3, 3)):
        place = clicks - click_origin(clicks, 64)
        assert (place >= 0).all()
        assert (place < 64).all()


def test_restore_wants_the_volume(tmp_path: Path) -> None:
    paths = save_as(tmp_path, "RAS", *blob((30, 40, 20), (1.5, 1.5, 1.5)))
    scan = read_volume(paths[0])
    assert isinstance(scan, ScanVolume)
    assert grid_of(scan.grid.header).shape == scan.image.shape
    with pytest.raises(ValueError, match="the volume is"):
        scan.restore(np.zeros((5, 5, 5), np.uint8))
