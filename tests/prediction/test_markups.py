"""Points and boxes from 3D Slicer's .mrk.json files, and millimetres in LPS."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from usam.prediction.prompts import (
    ObjectPrompts,
    ScanPrompts,
    read_prompts,
    slice_prompts_of,
    volume_prompts_of,
)

SCAN = Path("ct.nii.gz")


def points(*placed: tuple[str, list[float]], system: str = "LPS", **other: object) -> dict:
    """A point list as Slicer 5 writes it."""
    controls = [
        {"id": str(n), "label": label, "position": position, "positionStatus": "defined"}
        for n, (label, position) in enumerate(placed, start=1)
    ]
    return {
        "type": "Fiducial", "coordinateSystem": system, "coordinateUnits": "mm",
        "controlPoints": controls, **other,
    }  # fmt: skip


def roi(**other: object) -> dict:
    return {
        "type": "ROI", "coordinateSystem": "LPS", "center": [-10, 20, 30], "size": [4, 6, 8],
        "orientation": [-1, -0.0, 0, 0, -1, 0, 0, 0, 1], **other,
    }  # fmt: skip


def saved(folder: Path, *markups: dict) -> Namespace:
    file = folder / "liver.mrk.json"
    file.write_text(json.dumps({"@schema": "markups", "markups": markups}), encoding="utf-8")
    return Namespace(prompts=file, lps=False)


def test_a_point_list_of_slicer_is_read_in_its_own_coordinate_system(tmp_path: Path) -> None:
    args = saved(tmp_path, points(("F-1", [1, 2, 3]), ("-F-2", [4, 5, 6])))
    contents = read_prompts(args.prompts, [SCAN])
    wanted = ((-1.0, -2.0, 3.0, 1), (-4.0, -5.0, 6.0, 0))
    assert slice_prompts_of(args, contents, SCAN) == ScanPrompts(points=wanted, mm=True)
    found = volume_prompts_of(args, contents, SCAN)
    assert found.mm and found.objects == (ObjectPrompts("liver", 1, wanted),)
    args = saved(tmp_path, points(("F-1", [1, 2, 3]), system="RAS"))
    found = slice_prompts_of(args, read_prompts(args.prompts, [SCAN]), SCAN)
    assert found.points == ((1.0, 2.0, 3.0, 1),)


def test_points_not_placed_yet_are_left_out(tmp_path: Path) -> None:
    markup = points(("F-1", [1, 2, 3]), ("F-2", [0, 0, 0]))
    markup["controlPoints"][1]["positionStatus"] = "undefined"
    args = saved(tmp_path, markup)
    found = slice_prompts_of(args, read_prompts(args.prompts, [SCAN]), SCAN)
    assert len(found.points) == 1


def test_an_roi_is_a_box(tmp_path: Path) -> None:
    args = saved(tmp_path, roi())
    found = volume_prompts_of(args, read_prompts(args.prompts, [SCAN]), SCAN)
    assert found.objects[0].box == (8.0, -23.0, 26.0, 12.0, -17.0, 34.0)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (roi(orientation=[0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1]), "the ROI is rotated"),
        (roi(size=[1, 2]), "three numbers"),
        (roi(center=None), "list of numbers"),
        (points(system="XYZ") | {"controlPoints": [{"position": [1, 2, 3]}]}, "LPS or RAS"),
        (points() | {"coordinateUnits": "um"}, "expected mm"),
        (points() | {"type": "Curve"}, "'Curve'"),
        ([], "a markup must be a JSON object"),
    ],
)
def test_other_markups_are_refused_in_one_line(tmp_path: Path, markup: dict, text: str) -> None:
    args = saved(tmp_path, markup)
    contents = read_prompts(args.prompts, [SCAN])
    with pytest.raises(ValueError, match=text) as error:
        volume_prompts_of(args, contents, SCAN)
    assert str(error.value).startswith(str(args.prompts)) and "\n" not in str(error.value)


def test_lps_turns_millimetres_of_flags_and_files(tmp_path: Path) -> None:
    flags = {"prompts": None, "box": None, "slice": None, "mm": True, "lps": True}
    args = Namespace(point=[[1, 2, 3, 0]], **flags)
    assert slice_prompts_of(args, None, SCAN).points == ((-1.0, -2.0, 3.0, 0),)
    args = Namespace(point=None, **flags | {"box": [[1, 2, 3, 4, 5, 6]]})
    assert volume_prompts_of(args, None, SCAN).objects[0].box == (-1, -2, 3, -4, -5, 6)
    args = Namespace(prompts=tmp_path / "p.json", lps=True)
    args.prompts.write_text('{"points": [[1, 2, 3]], "mm": true}', encoding="utf-8")
    contents = read_prompts(args.prompts, [SCAN])
    assert slice_prompts_of(args, contents, SCAN).points == ((-1.0, -2.0, 3.0, 1),)
    args.prompts.write_text('{"points": [[1, 2, 3]]}', encoding="utf-8")
    with pytest.raises(ValueError, match='--lps is for millimetres; the prompts need "mm": true'):
        slice_prompts_of(args, read_prompts(args.prompts, [SCAN]), SCAN)
