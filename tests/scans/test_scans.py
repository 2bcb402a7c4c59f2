"""Scans: readers and their bounds, the canonical frame and its exact inverse, windows, sizes."""

from __future__ import annotations

import gzip
import io
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dataset import care as rectum
from dataset.scans.find import files_of
from dataset.scans.in_plane import body_box, crop, resample_in_plane
from dataset.scans.orientation import SliceStack, from_canonical, to_canonical
from dataset.scans.read import read_label, read_scan
from dataset.scans.window import WINDOWS, apply_window, parse_window, window_limits, window_misfit
from dataset.scans.write import write_label_map

SHAPE = (7, 6, 5)  # x, y, z
SPACING = (0.7, 0.9, 2.5)


def lps_affine() -> np.ndarray:
    """LPS voxel index -> RAS mm."""
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = 40.0, 50.0, -60.0
    return affine


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, lps_affine() if affine is None else affine), path)
    return path


def ramp() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "RPI", "SPL", "ASR", "PIR"])
def test_every_orientation_gives_the_same_slices_and_comes_back(tmp_path, codes):
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(codes)
    )
    array = nib.apply_orientation(ramp(), turn)
    affine = lps_affine() @ nib.orientations.inv_ornt_aff(turn, SHAPE)
    scan = read_scan(write(tmp_path / "a.nii.gz", array, affine))
    assert "".join(nib.aff2axcodes(scan.affine)) == codes
    volume = to_canonical(scan)
    np.testing.assert_array_equal(volume.slices, ramp().transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine, lps_affine(), atol=1e-5)
    np.testing.assert_allclose(volume.spacing, SPACING[::-1], rtol=1e-6)
    np.testing.assert_array_equal(from_canonical(volume.slices, scan), array)
    stored = to_canonical(scan, "stored")
    np.testing.assert_array_equal(stored.slices, ramp().transpose(2, 0, 1))
    np.testing.assert_array_equal(from_canonical(stored.slices, scan, "stored"), array)


def test_an_oblique_scan_takes_the_nearest_axes_and_is_not_resampled(tmp_path):
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    scan = read_scan(write(tmp_path / "a.nii", ramp(), turn @ lps_affine()))
    volume = to_canonical(scan)
    np.testing.assert_array_equal(volume.slices, ramp().transpose(2, 1, 0))
    np.testing.assert_array_equal(from_canonical(volume.slices, scan), ramp())


def test_a_canonical_voxel_keeps_its_place_in_millimetres(tmp_path):
    scan = read_scan(write(tmp_path / "a.nii", ramp(), np.diag([0.7, 0.9, 2.5, 1.0])))
    volume = to_canonical(scan)
    z, y, x = np.argwhere(volume.slices == ramp()[2, 3, 4])[0]
    found = volume.affine @ [x, y, z, 1]
    np.testing.assert_allclose(found[:3], [2 * 0.7, 3 * 0.9, 4 * 2.5], atol=1e-5)


def test_a_saved_label_has_the_scans_affine_and_shape(tmp_path):
    scan = read_scan(write(tmp_path / "a.nii.gz", ramp()))
    label = (ramp() % 3).astype(np.uint8)
    write_label_map(tmp_path / "out.nii.gz", label, scan.header)
    again = read_label(tmp_path / "out.nii.gz", num_classes=3)
    np.testing.assert_array_equal(again.array, label)
    np.testing.assert_allclose(again.affine, scan.affine, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", ">i2", "uint16", "int32", "float64"])
def test_stored_types_are_read_by_value(tmp_path, dtype):
    array = (ramp() % 100).astype(dtype)
    image = nib.Nifti1Image(array, lps_affine(), dtype=np.dtype(dtype).newbyteorder("="))
    nib.save(image, tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scan.array, ramp() % 100)
    assert scan.array.dtype in (np.uint8, np.int16, np.float32)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(ramp(), lps_affine())
    image.header.set_slope_inter(2.0, -1024.0)
    nib.save(image, tmp_path / "a.nii")
    stored = nib.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_array_equal(read_scan(tmp_path / "a.nii").array, stored)


def test_one_slice_is_a_scan(tmp_path):
    scan = read_scan(write(tmp_path / "a.nii", ramp()[:, :, :1]))
    assert to_canonical(scan).slices.shape == (1, 6, 7)


def test_a_channel_of_a_4d_scan_must_be_chosen(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.stack([ramp(), ramp() + 1], axis=3))
    with pytest.raises(ValueError, match="2 volumes; choose one with --channel"):
        read_scan(path)
    with pytest.raises(ValueError, match="no channel 2"):
        read_scan(path, channel=2)
    np.testing.assert_array_equal(read_scan(path, channel=1).array, ramp() + 1)
    np.testing.assert_array_equal(
        read_scan(write(tmp_path / "b.nii", ramp()[..., None])).array, ramp()
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    array = ramp().astype(np.float64)
    array[0, 0, 0] = value
    with pytest.raises(ValueError, match="1 voxels are NaN or infinite"):
        read_scan(write(tmp_path / "a.nii", array))


@pytest.mark.parametrize(
    ("value", "text"), [(255, "255"), (-1, "-1"), (1.5, "not whole numbers: 1.5")]
)
def test_labels_outside_the_table_are_refused_with_their_ids(tmp_path, value, text):
    array = np.zeros(SHAPE, dtype=np.float32)
    array[1, 1, 1] = value
    with pytest.raises(ValueError, match=text):
        read_label(write(tmp_path / "a.nii.gz", array), num_classes=3)


def singular(path: Path) -> Path:
    """A NIfTI whose third sform row is zero."""
    image = nib.Nifti1Image(ramp(), lps_affine())
    image.header["srow_z"] = 0
    image.header["sform_code"] = 1
    path.write_bytes(image.header.binaryblock + bytes(4) + ramp().tobytes(order="F"))
    return path


def test_bad_files_give_one_line(tmp_path):
    good = write(tmp_path / "good.nii.gz", np.random.default_rng(0).normal(size=(40, 40, 40)))
    data = good.read_bytes()
    for name, content, text in [
        ("cut.nii.gz", data[:4000], "truncated or damaged"),
        ("flipped.nii.gz", data[:-8] + b"\0\0\0\0" + data[-4:], "damaged"),
        ("cut.nii", gzip.decompress(data)[:-10], "truncated or damaged"),
        ("text.nii.gz", b"hello", "not a readable NIfTI"),
        ("empty.nii", b"", "not a readable NIfTI"),
        ("a.txt", b"", "not a scan"),
        ("a.npz", b"PK", "not a CARE slice"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=text) as caught:
            read_scan(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such scan"):
        read_scan(tmp_path / "none.nii")
    with pytest.raises(ValueError, match="2D image"):
        read_scan(write(tmp_path / "flat.nii", ramp()[:, :, 0]))
    with pytest.raises(ValueError, match="matrix is singular"):
        read_scan(singular(tmp_path / "singular.nii"))


def bomb(path: Path, dims: tuple[int, int, int], *, packed: bool) -> Path:
    """A NIfTI of 1 KB that claims float64 voxels of the given dims."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float64)
    header["dim"][:4] = (3, *dims)
    header["pixdim"][1:4] = 1
    header["vox_offset"], header["magic"] = 352, b"n+1"
    data = header.binaryblock + bytes(1024)
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


@pytest.mark.parametrize("dims", [(32767, 32767, 32767), (1000, 1000, 900), (-5, 4, 4), (0, 4, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_bombs_are_refused_by_their_header(tmp_path, dims, packed):
    path = bomb(tmp_path / ("a.nii.gz" if packed else "a.nii"), dims, packed=packed)
    with pytest.raises(ValueError, match="header claims|not a readable"):
        read_scan(path)


def test_a_gzip_bomb_stays_within_an_address_space_limit(tmp_path):
    path = tmp_path / "a.nii.gz"
    header = nib.load(bomb(tmp_path / "b.nii", (1000, 1000, 1000), packed=False)).header
    with gzip.open(path, "wb", compresslevel=9) as stream:
        stream.write(header.binaryblock + bytes(4))
        for _ in range(64):
            stream.write(bytes(2**20))
        # Noise makes the file large enough for what the header claims; no byte of NaN in it.
        stream.write(np.random.default_rng(0).integers(0, 100, 9_000_000, np.uint8).tobytes())
    code = f"from dataset.scans.read import read_scan\nread_scan({str(path)!r})"
    limit = 4 * 2**30
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert "ValueError" in done.stderr.splitlines()[-1]
    assert "not enough memory" in done.stderr or "truncated" in done.stderr


def test_windows_saturate_and_never_wrap():
    slices = np.array([[[-3024, -160, 40, 240, 32000]]], dtype=np.int16)
    np.testing.assert_array_equal(apply_window(slices, (-160, 240)), [[[0, 0, 128, 255, 255]]])
    np.testing.assert_array_equal(
        apply_window(slices.astype(np.float32), "abdomen"), [[[0, 0, 128, 255, 255]]]
    )


def test_a_care_slice_is_scaled_as_it_was_packed(tmp_path):
    image = np.random.default_rng(0).integers(-20, 275, (16, 12)) / 255
    np.savez(tmp_path / "a.npz", image=image, label=np.zeros((16, 12)))
    stored = to_canonical(read_scan(tmp_path / "a.npz"), "stored").slices
    np.testing.assert_array_equal(
        apply_window(stored, None)[0], rectum.read_slice(tmp_path / "a.npz")[0]
    )


def test_percentiles_ignore_outliers_and_constants():
    slices = np.arange(10_000, dtype=np.float32).reshape(1, 100, 100)
    low, high = window_limits(slices, "percentile")
    assert (low, high) == pytest.approx((49.995, 9949.005))
    assert not apply_window(np.full((2, 3, 3), 7, np.int16), "percentile").any()


def test_a_window_that_does_not_suit_a_scan_is_named():
    hu = np.random.default_rng(0).normal(0, 300, (5, 32, 32)).astype(np.int16)
    assert window_misfit(hu, (-160, 240)) == window_misfit(hu, "percentile") == ""
    assert "leaves 2 grey values" in window_misfit((hu / 2000 + 0.5).clip(0, 1), (-160, 240))
    assert "leaves 1 grey value;" in window_misfit(hu + 3000, (-160, 240))
    assert "shows 99% of the voxels above its lower limit as white" in window_misfit(
        hu * 4 + 3000, (-160, 240)
    )
    assert window_misfit(np.full((2, 3, 3), 7), "percentile") == "every voxel is 7"
    ct = np.random.default_rng(0).normal(40, 60, (5, 32, 32))
    ct[:, :, :16] -= 1040  # air
    assert all(window_misfit(ct, window) == "" for window in WINDOWS.values())
    assert "is an offset missing?" in window_misfit(ct + 1024, (-160, 240))
    assert window_misfit(ct + 1024, "percentile") == ""


def test_percentiles_of_a_scan_with_few_bright_voxels_differ():
    few = np.zeros((2, 50, 50))
    few[0, 0, :3] = 5.0
    assert window_limits(few, "percentile") == (0, 1)
    assert apply_window(few, window_limits(few, "percentile"))[0, 0, :4].tolist() == [255] * 3 + [0]


def test_windows_are_parsed_by_name_or_number():
    assert parse_window(["-160", "240"]) == (-160, 240)
    assert parse_window(["lung"]) == (-1350, 150)
    assert parse_window(["percentile"]) == "percentile"
    for words in (["nonsense"], ["3"], ["5", "1"], ["nan", "1"], ["1", "2", "3"]):
        with pytest.raises(ValueError, match="is not known; wanted LOW HIGH"):
            parse_window(words)


def disc(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return (y**2 + x**2 < (size / 4) ** 2).astype(np.uint8)


def test_resampling_keeps_outer_edges_and_areas():
    mask = np.stack([disc(64)] * 2)
    volume = SliceStack(mask, (2.5, 1.0, 1.0), lps_affine())
    half = resample_in_plane(volume, 2.0, labels=True)
    assert half.slices.shape == (2, 32, 32)
    assert half.spacing == (2.5, 2.0, 2.0)
    assert half.slices.sum() * 4 == pytest.approx(mask.sum(), rel=0.03)
    corner = np.array([-0.5, -0.5, 0, 1])
    np.testing.assert_allclose(half.affine @ corner, volume.affine @ corner)
    np.testing.assert_allclose(half.affine @ [31.5, 31.5, 0, 1], volume.affine @ [63.5, 63.5, 0, 1])
    assert resample_in_plane(volume, 1.0) is volume
    grown = resample_in_plane(SliceStack(255 * mask, (2.5, 1.0, 1.0), lps_affine()), 0.5)
    assert grown.slices.shape == (2, 128, 128)
    with pytest.raises(ValueError, match="cannot be resampled"):
        resample_in_plane(SliceStack(mask, None, None), 1.0)
    with pytest.raises(ValueError, match="gives slices of"):
        resample_in_plane(volume, 0.001)


def test_the_body_box_leaves_the_table_out():
    slices = np.full((3, 128, 128), -1000, dtype=np.int16)
    slices[:, 32:80, 40:96] = 40  # the patient
    slices[:, 120:124, :] = 200  # the table
    y0, y1, x0, x1 = body_box(slices, (-160, 240))
    assert 20 <= y0 <= 32
    assert 80 <= y1 <= 92
    assert 28 <= x0 <= 40
    assert 96 <= x1 <= 108
    volume = SliceStack(slices, (1.0, 1.0, 1.0), lps_affine())
    inner = crop(volume, (y0, y1, x0, x1))
    np.testing.assert_allclose(inner.affine @ [0, 0, 0, 1], volume.affine @ [x0, y0, 0, 1])
    np.testing.assert_array_equal(inner.slices, slices[:, y0:y1, x0:x1])
    assert body_box(np.full((2, 50, 60), -1000, np.int16), (-160, 240)) == (0, 50, 0, 60)


def test_a_care_slice_is_upright_in_lps_and_as_released_when_stored(tmp_path):
    image = np.linspace(-0.1, 1.1, 12).reshape(3, 4)
    np.savez(tmp_path / "a.npz", image=image, label=np.zeros((3, 4)))
    scan = read_scan(tmp_path / "a.npz")
    assert scan.affine is None
    np.testing.assert_allclose(to_canonical(scan, "stored").slices[0], image, atol=1e-6)
    upright = to_canonical(scan)
    np.testing.assert_allclose(upright.slices[0], image.T, atol=1e-6)
    np.testing.assert_array_equal(from_canonical(upright.slices, scan), scan.array)


def test_an_npz_bomb_is_refused_by_its_header(tmp_path):
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**5, 10**5)}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", stream.getvalue() + bytes(64))
    with pytest.raises(ValueError, match="header claims"):
        read_scan(tmp_path / "a.npz")


def test_a_dicom_series_and_its_nifti_agree(shared_data):
    series = read_scan(shared_data / "dicom")
    nifti = read_scan(shared_data / "dicom" / "ct.nii.gz")
    assert series.header.format == "dicom"
    assert series.array.dtype == np.int16
    np.testing.assert_array_equal(to_canonical(series).slices, to_canonical(nifti).slices)
    np.testing.assert_allclose(to_canonical(series).affine, to_canonical(nifti).affine, atol=1e-3)
    label = read_label(shared_data / "dicom" / "liver_seg.nrrd", num_classes=3)
    assert label.header.format == "nrrd"


def test_a_series_with_a_missing_slice_is_refused(tmp_path, shared_data):
    image = sitk.GetImageFromArray(np.zeros((5, 8, 8), dtype=np.int16))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in (0, 1, 2, 4):
        plane = image[:, :, k]
        for key, value in {
            "0020|000e": "1.2.3",
            "0020|000d": "1.2",
            "0020|0032": f"0\\0\\{k * 2}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(k),
            "0008|0060": "CT",
        }.items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(tmp_path / f"{k}.dcm"))
        writer.Execute(plane)
    with pytest.raises(ValueError, match=r"1 slice missing: 2\.dcm and 4\.dcm lie 4 mm apart"):
        read_scan(tmp_path)


def test_nrrd_and_nifti_of_one_volume_agree(tmp_path):
    image = sitk.GetImageFromArray(ramp().transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    image.SetOrigin((-40.0, -50.0, -60.0))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"), True)
    scan = read_scan(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(scan.array, ramp())
    np.testing.assert_allclose(scan.affine, lps_affine(), atol=1e-6)


def test_real_labels_come_back_exactly(shared_data):
    label = read_label(shared_data / "amos_label" / "labelsVa" / "amos_0013.nii.gz", 16)
    assert "".join(nib.aff2axcodes(label.affine)) == "LAS"
    volume = to_canonical(label)
    np.testing.assert_array_equal(from_canonical(volume.slices, label), label.array)
    # The liver (6) lies on the patient's right: small x in a canonical slice.
    assert np.argwhere(volume.slices == 6)[:, 2].mean() < 256
    read_label(shared_data / "word" / "labels_only" / "word_0074.nii.gz", 17)


@pytest.mark.parametrize("value", [0.9999, 1 - 6e-8, 1.0004])
def test_labels_within_a_thousandth_of_a_whole_number_are_that_number(tmp_path, value):
    array = np.zeros(SHAPE, dtype=np.float64)
    array[1, 1, 1] = value
    label = read_label(write(tmp_path / "a.nii.gz", array), num_classes=2)
    assert label.array.dtype == np.uint8
    assert label.array.sum() == 1


def test_a_label_of_several_volumes_is_refused_as_one(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.zeros((*SHAPE, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="a label map of 3 volumes; expected one volume"):
        read_label(path)


def test_a_pipe_is_refused_and_does_not_hang(tmp_path):
    for name in ("x.nii", "x.nii.gz", "x.nrrd", "x.mha", "x.npz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="not a regular file"):
            read_scan(tmp_path / name)


def test_a_qform_with_a_negative_voxel_size_is_one_line(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(SHAPE)
    header.set_qform(lps_affine(), 1)
    header["pixdim"][2], header["vox_offset"] = -0.9, 352
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + bytes(4) + ramp().tobytes(order="F"))
    with pytest.raises(ValueError, match=r"voxel sizes 0\.7 x -0\.9 x 2\.5 mm .* negative"):
        read_scan(path)


def test_metres_and_micrometres_become_millimetres(tmp_path):
    for unit, factor in (("meter", 0.001), ("micron", 1000)):
        image = nib.Nifti1Image(ramp(), np.diag([factor] * 3 + [1]) @ lps_affine())
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / "a.nii")
        scan = read_scan(tmp_path / "a.nii")
        np.testing.assert_allclose(scan.affine, lps_affine(), rtol=1e-6)
        np.testing.assert_allclose(scan.spacing, SPACING, rtol=1e-6)
        assert scan.header.voxel_ml == pytest.approx(0.7 * 0.9 * 2.5 / 1000)


def test_sform_and_qform_apart_are_named_with_their_distance(tmp_path):
    image = nib.Nifti1Image(ramp(), lps_affine())
    image.header.set_sform(lps_affine(), 1)
    moved = lps_affine()
    moved[0, 3] += 30
    image.header.set_qform(moved, 1)
    nib.save(image, tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_allclose(scan.affine, lps_affine(), atol=1e-5)
    assert scan.header.remarks == ("sform and qform put voxels up to 30 mm apart; sform used",)


def test_a_tilted_scan_is_written_where_it_is_or_not_at_all_for_itk(tmp_path):
    affine = lps_affine()
    affine[1, 2] = 0.8
    image = sitk.GetImageFromArray(ramp().transpose(2, 1, 0))
    image.SetSpacing([float(size) for size in np.linalg.norm(affine[:3, :3], axis=0)])
    turn = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    image.SetDirection((np.diag([-1, -1, 1]) @ turn).ravel().tolist())
    image.SetOrigin((-40.0, -50.0, -60.0))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    scan = read_scan(tmp_path / "a.nrrd")
    assert "gantry tilt or shear of 17.7 degrees" in scan.header.remarks[0]
    write_label_map(tmp_path / "seg.nii", (ramp() % 2).astype(np.uint8), scan.header)
    np.testing.assert_allclose(nib.load(tmp_path / "seg.nii").affine, affine, atol=1e-5)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "seg.nii"))


def test_the_voxels_of_a_detached_header_belong_to_the_scan(tmp_path):
    image = sitk.GetImageFromArray(ramp().transpose(2, 1, 0))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    np.testing.assert_array_equal(read_scan(tmp_path / "a.mhd").array, ramp())
    assert [path.name for path in files_of(tmp_path / "a.mhd")] == ["a.mhd", "a.raw"]
    (tmp_path / "a.raw").unlink()
    with pytest.raises(ValueError, match=r"its voxels should lie in a\.raw"):
        read_scan(tmp_path / "a.mhd")


def test_a_long_axis_is_written_as_nifti_2(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((2, 2, 40_000), dtype=np.int16))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    scan = read_scan(tmp_path / "a.nrrd")
    write_label_map(tmp_path / "seg.nii.gz", np.ones(scan.array.shape, np.uint8), scan.header)
    assert nib.load(tmp_path / "seg.nii.gz").shape == (40_000, 2, 2)
