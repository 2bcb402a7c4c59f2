"""Points and boxes reach the model where the user meant them, however a scan lies."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.oracle import (
    CODES,
    DEPTH,
    SIDE,
    Marker,
    Oracle,
    coded,
    data_of,
    lps_affine,
    predict,
    truth,
    turned,
    write,
)
from usam.prediction.prompts import ScanPrompts, read_prompts, scan_prompts, slice_prompts_of


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
        scan_prompts([voxel], None, None),
        scan_prompts([[*millimetres, 1.0]], None, None, mm=True),
    ):
        result = predict(scan, tmp_path / "o", Marker(), data, prompts=given, prompt_mode=2)
        np.testing.assert_array_equal(np.asarray(result.dataobj), expected)


@pytest.mark.parametrize(
    ("codes", "axis"), [("LPS", 2), ("RAS", 2), ("LAS", 2), ("PIR", 1), ("SAL", 0)]
)
def test_a_box_marks_its_voxels_along_the_axes_of_the_file(tmp_path, codes, axis):
    array, affine = turned(coded(truth()), lps_affine(), codes)
    scan = write(tmp_path / "scan.nii.gz", array, affine)
    given = scan_prompts(None, [[2, 3, 8, 5]], [4])
    expected = np.zeros(array.shape, dtype=np.uint8)
    np.moveaxis(expected, axis, 2)[2:9, 3:6, 4] = 1
    result = predict(scan, tmp_path / "o", Marker(), data_of(2), prompts=given, prompt_mode=1)
    np.testing.assert_array_equal(np.asarray(result.dataobj), expected)
    facts = json.loads((tmp_path / "o" / "out_seg.json").read_text(encoding="utf-8"))
    assert facts["prompted_slices"] == [4]  # as the file has them, whichever way it is stored


def test_slices_without_a_prompt_stay_background(tmp_path):
    label = np.full((SIDE, SIDE, DEPTH), 1)
    label[0, 0, 0] = 2  # a scan of one value is not shown to the model
    scan = write(tmp_path / "scan.nii", coded(label), lps_affine())
    given = scan_prompts([[1, 1, 2], [3, 3, 2, 0], [1, 1, 5]], None, None)
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
    given = scan_prompts([[1, 7, 2]], None, None)
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
def test_wrong_prompts_are_refused_in_one_line(tmp_path, mode, points, boxes, slices, text):
    scan = write(tmp_path / "a.nii", coded(truth()), lps_affine())
    with pytest.raises(ValueError, match=text) as error:
        given = scan_prompts(points, boxes, slices)
        predict(scan, tmp_path / "o", Marker(), data_of(2), prompts=given, prompt_mode=mode)
    assert "\n" not in str(error.value)
    assert not list((tmp_path).glob("o/*"))


def from_file(file: Path, scan: Path, scans: list[Path] | None = None) -> ScanPrompts:
    args = Namespace(prompts=file, lps=False)
    return slice_prompts_of(args, read_prompts(file, scans or [scan]), scan)


def test_prompts_come_from_a_file_too(tmp_path):
    file = tmp_path / "prompts.json"
    one = {"points": [[1, 2, 3], [4, 5, 6, 0]], "boxes": [{"slice": 2, "box": [1, 2, 3, 4]}]}
    expected = ScanPrompts(
        points=((1.0, 2.0, 3.0, 1), (4.0, 5.0, 6.0, 0)), boxes=((2, 1.0, 2.0, 3.0, 4.0),)
    )
    file.write_text(json.dumps(one), encoding="utf-8")
    scans = [tmp_path / name for name in ("a.nii.gz", "b.nii", "c.nii")]
    assert from_file(file, scans[0]) == expected
    content = {"scans": {"a.nii.gz": one, "b.nii": {"mm": True}}}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert from_file(file, scans[0], scans) == expected
    assert from_file(file, scans[1], scans) == ScanPrompts(mm=True)
    with pytest.raises(ValueError, match="has no prompts for the scan 'c.nii'"):
        from_file(file, scans[2], scans)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"points": []}, "holds prompts of one scan, --predict names 3"),
        ({"scans": {"d.nii": {}}}, "has prompts for 'd.nii', which is not among the 3 scans"),
        ({"scans": {"a.nii": {}}}, "'a.nii' fits 2 scans, .*write the folder in front"),
        ({"scans": {"1/a.nii": {}, "x/1/a.nii": {}}}, "names a.nii twice"),
        ({"scans": {"b.nii": {}}, "mm": True}, "'mm' beside \"scans\""),
    ],
)
def test_prompts_that_fit_no_scan_or_several_are_refused(content, text, tmp_path):
    file, scans = (
        tmp_path / "p.json",
        [tmp_path / "x" / name for name in ("1/a.nii", "2/a.nii", "b.nii")],
    )
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=text):
        read_prompts(file, scans)


def test_scans_of_one_name_are_told_apart_by_their_folders(tmp_path):
    file, scans = tmp_path / "p.json", [tmp_path / "1" / "a.nii", tmp_path / "2" / "a.nii"]
    content = {"scans": {"1/a.nii": {"points": [[1, 2, 3]]}, "2/a.nii": {"points": [[4, 5, 6]]}}}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert from_file(file, scans[1], scans).points == ((4.0, 5.0, 6.0, 1),)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"point": []}', '{"boxes": [[1]]}', '{"points": {}}', "[" * 100000, "\xff",
        '{"mm": "false"}', '{"points": [[1, 2, NaN]]}', '{"points": [[1, 2, 3, true]]}',
        '{"mm": true, "mm": false}', '{"points": [[1, 2, 1' + 400 * "0" + "]]}",
        '{"boxes": [{"slice": 1' + 400 * "0" + ', "box": [1, 2, 3, 4]}]}',
        '{"boxes": [{"slice": true, "box": [1, 2, 3, 4]}]}',
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "prompts.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="prompts.json") as error:
        from_file(file, tmp_path / "a.nii")
    assert "\n" not in str(error.value)
