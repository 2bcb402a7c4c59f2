"""DICOM series: the true reason of a refusal, series to choose from, volumes of one series."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from dataset.scans.find import find_scans
from dataset.scans.read import read_header, read_scan
from tests.stress.scans import dicom
from tests.stress.scans.dicom import changed_cases, multiframe, series

REASONS = {
    "third slice with larger pixels": r"pixels of different sizes, 00\.dcm 0\.8 x 0\.9 mm and 02",
    "middle slice 5 mm aside": r"03\.dcm is shifted by 5 mm in its plane",
    "middle slice 0.2 mm aside": r"03\.dcm is shifted by 0\.2 mm",
    "last slice flipped": r"05\.dcm is turned by 180 degrees against 00\.dcm",
    "a slice turned by 1 degree": r"02\.dcm is turned by 1 degrees",
    "two scouts": r"01\.dcm is turned by 90 degrees",
    "three orientations": "is turned by 90 degrees|is turned by 120 degrees",
    "all at one place": "all 6 slices lie at one position",
    "growing gaps": r"gaps between slices change steadily, from 2\.1 to 2\.9 mm",
    "uneven gaps": r"slices lie 1\.6 to 2\.4 mm apart",
    "a slice missing": r"1 slice missing: 02\.dcm and 04\.dcm lie 5 mm apart, others 2\.5 mm",
    "two slices missing": "2 slices missing",
    "a slice doubled": r"duplicate: 04\.dcm and 05\.dcm lie at the same position",
    "a file copied": r"duplicate: (02 copy\.dcm and 02\.dcm are copies|02\.dcm and 02 copy)",
    "one without position": r"1 of 6 slices state no position, 03\.dcm for one",
    "one without orientation": "1 of 6 slices state no orientation",
    "one without pixel spacing": "1 of 6 slices state no pixel spacing",
    "one slice with more columns": "images of different sizes",
    "palette": r"a colour image \(PALETTE COLOR\), not a scan",
    "three samples": r"a colour image \(RGB\), not a scan",
    "segmentation": r"a segmentation \(SEG\), not a scan",
    "segmentation by its class": r"a segmentation \(SEG\), not a scan",
    "dose": r"a dose distribution \(RTDOSE\), not a scan",
    "contours": r"a set of contours \(RTSTRUCT\), not a scan",
    "orientation of length 0.9": "not two unit vectors",
    "axes at 60 degrees": "right angles",
    "position NaN": "expected 3 finite numbers",
    "two numbers of position": "expected 3 finite numbers",
    "cut": "pixel data cannot be read",
    "two frames of reference": r"05\.dcm lies in another frame of reference than 00\.dcm",
    "last slice damaged": r"05\.dcm: not a readable DICOM file",
    "last slice empty": r"05\.dcm: not a DICOM file; a slice may be damaged",
    "two series": "holds 2 DICOM series; choose one with --series",
    "two echoes": "holds 2 volumes; choose one with --channel",
    "two times without a key": "holds 2 volumes; choose one with --channel",
    "one place twice, another thrice": "duplicate: 04.dcm and 05.dcm",
    "multi-frame, four weightings": "holds 4 volumes; choose one with --channel",
    "multi-frame, a frame aside": r"one\.dcm frame 3 is shifted by 5 mm",
    "multi-frame, a frame flipped": r"one\.dcm frame 4 is turned by 180 degrees",
    "metadata of a few frames": "describes 5 of 6 frames",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_of_a_refusal_is_the_true_one(tmp_path: Path, name: str) -> None:
    path = changed_cases()[name](tmp_path)
    with pytest.raises(ValueError, match=REASONS[name]) as caught:
        read_scan(path)
    assert len(str(caught.value).splitlines()) <= 2


REMARKS = {
    "no position": "its slices state no position; ordered by instance numbers",
    "no orientation": "states no orientation",
    "no pixel spacing": "states no voxel size; volumes are given in voxels",
    "pixel spacing 0": "states no voxel size",
    "no place at all": "states no voxel size",
    "one slice without thickness": "states no voxel size",
    "multi-frame, undescribed": "its slices state no position",
    "MONOCHROME1": "MONOCHROME1: values are as stored",
    "tilt of 18.5 degrees": r"gantry tilt or shear of 18\.5 degrees: ITK-based viewers",
    "tilt of 1 degree": r"gantry tilt or shear of 1\.0 degrees",
}


@pytest.mark.parametrize("name", REMARKS)
def test_what_a_header_lacks_is_stated(tmp_path: Path, name: str) -> None:
    header = read_header(changed_cases()[name](tmp_path))
    assert any(re.search(REMARKS[name], remark) for remark in header.remarks)
    if "voxel size" in REMARKS[name]:
        assert header.spacing is None
        assert header.voxel_ml is None


def test_a_series_is_chosen_by_its_number_in_the_list(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    series(tmp_path / "deep", all_slices={"SeriesInstanceUID": "1.2.7", "SeriesNumber": 5},
           count=3)  # fmt: skip
    series(tmp_path, name="b{}.dcm".format)
    with pytest.raises(ValueError) as caught:
        read_scan(tmp_path)
    first, listed = str(caught.value).splitlines()
    assert first.endswith("holds 2 DICOM series; choose one with --series NUMBER:")
    assert listed.strip() == ("1: CT 7 x 8, 0.8 x 0.9 mm, axial, 6 slices;"
                              " 2: CT 7 x 8, 0.8 x 0.9 mm, axial, 3 slices")  # fmt: skip
    assert read_scan(tmp_path, series=1).array.shape == (7, 8, 6)
    assert read_scan(tmp_path, series=2).array.shape == (7, 8, 3)
    with pytest.raises(ValueError, match="no series 3; it holds 2"):
        read_scan(tmp_path, series=3)
    assert find_scans([tmp_path]) == [tmp_path]


def test_a_segmentation_beside_a_scan_is_listed_and_contours_are_not(tmp_path: Path) -> None:
    series(tmp_path)
    contours = dicom.slice_of(0)
    contours.SeriesInstanceUID, contours.Modality = "1.2.11", "RTSTRUCT"
    for name in ("Rows", "Columns", "PixelData"):
        delattr(contours, name)
    dicom.save(contours, tmp_path / "contours.dcm")
    assert read_scan(tmp_path).array.shape == (7, 8, 6)
    seg = {"SeriesInstanceUID": "1.2.12", "Modality": "SEG", "SeriesNumber": 2}
    series(tmp_path, all_slices=seg, count=1, name="seg{}.dcm".format)
    with pytest.raises(ValueError, match=r"2: a segmentation \(SEG\), not a scan"):
        read_scan(tmp_path)
    with pytest.raises(ValueError, match=r"a segmentation \(SEG\), not a scan"):
        read_scan(tmp_path, series=2)


def test_volumes_of_one_series_are_sorted_by_what_differs(tmp_path: Path) -> None:
    echoes = dicom._times(lambda n: n % 6, EchoTime=lambda n: 90 if n < 6 else 5,
                          RescaleIntercept=lambda n: 1000 if n < 6 else 0)  # fmt: skip
    series(tmp_path, count=12, each=echoes)
    first, second = (read_scan(tmp_path, channel=n).array for n in (0, 1))
    assert first.max() < 200  # the echo of 5 ms
    assert second.min() >= 1000


def test_frames_are_placed_and_scaled_one_by_one(tmp_path: Path) -> None:
    multiframe(tmp_path, volumes=4, change=lambda frames: frames.reverse())
    scan = read_scan(tmp_path, channel=0)  # b = 0, whose frames come last, highest place first
    stored = pydicom.dcmread(tmp_path / "one.dcm").pixel_array.astype(float)
    expected = (stored[:17:-1] * 0.5 + 1).transpose(2, 1, 0)
    np.testing.assert_allclose(scan.array, expected)
    np.testing.assert_allclose(scan.affine[:3, 3], [30, 40, 50])
    np.testing.assert_allclose(scan.spacing, [0.8, 0.9, 2.5])


def test_values_are_exact_where_slices_are_rescaled_differently(tmp_path: Path) -> None:
    series(tmp_path, each=lambda k, content: (
        setattr(content, "RescaleSlope", 0.5 if k else 1),
        setattr(content, "RescaleIntercept", 0)))  # fmt: skip
    array = read_scan(tmp_path).array
    assert array.dtype == np.float32
    assert array[1, 0, 0] == 1.0
    assert array[1, 0, 1] == 5.5  # (10 + 1) * 0.5


def test_a_tilted_series_keeps_every_slice_in_its_place(tmp_path: Path) -> None:
    path = changed_cases()["tilt of 18.5 degrees"](tmp_path)
    affine = read_header(path).affine
    np.testing.assert_allclose(affine @ [0, 0, 3, 1], [30, 40, 57.5, 1], atol=1e-9)
    np.testing.assert_allclose(affine[:3, 1], 0.9 * np.array([0, -0.948324, 0.317305]), atol=1e-6)


def test_a_pipe_among_the_files_is_passed_over(tmp_path: Path) -> None:
    series(tmp_path)
    os.mkfifo(tmp_path / "pipe.dcm")
    assert read_header(tmp_path).shape == (7, 8, 6)


def test_compressed_pixels_that_cannot_be_decoded_name_their_syntax(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    series(tmp_path)
    for path in tmp_path.iterdir():
        content = pydicom.dcmread(path)
        content.PixelData = pydicom.encaps.encapsulate([bytes(64)])
        content["PixelData"].is_undefined_length = True
        content.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
        content.save_as(path)
    with pytest.raises(ValueError, match="SimpleITK cannot decode JPEG Extended") as caught:
        read_scan(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_simpleitk_reads_the_same_volume(tmp_path: Path) -> None:
    series(tmp_path, each=dicom._placed(dicom._turned(30, "x")))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(scan.array, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    place = image.TransformIndexToPhysicalPoint([6, 7, 5])
    np.testing.assert_allclose(scan.affine @ [6, 7, 5, 1], [-place[0], -place[1], place[2], 1],
                               atol=1e-6)  # fmt: skip
