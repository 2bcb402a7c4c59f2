"""Points and boxes that a user gives for scans, from flags or a file, for both systems.

Frames: a point is (x, y, z), indices of a voxel along the three axes of the file as stored, from
0, or with mm scanner coordinates in millimetres, RAS as in NIfTI and 3D Slicer. For U-SAM a box is
(x1, y1, x2, y2) on one slice: indices of its first and last voxel along the two axes of the file
that lie in the slice, in the order of the file; its slice is the index along the third, the axis
nearest to head-feet. For SAM-Med3D a box is (x1, y1, z1, x2, y2, z2), in the frame of the points.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.labels import MAX_LABEL
from dataset.text import counted
from usam.prediction.markups import as_slice_prompts, as_volume_prompts, is_markups

MAX_JSON_BYTES = 64 << 20
MAX_INDEX = 2**31
OBJECT_KEYS = {"name", "label", "points", "box", "boxes", "centre"}

Point = tuple[float, float, float, int]
SliceBox = tuple[int | None, float, float, float, float]


@dataclass(frozen=True)
class ScanPrompts:
    """A user's prompts in one scan for U-SAM; coordinates as in this module's docstring.

    points: (x, y, z, label), label 1 object or 0 background. boxes: (slice, x1, y1, x2, y2), slice
    None where the scan has only one. mm: points are in millimetres, boxes never.
    """

    points: tuple[Point, ...] = ()
    boxes: tuple[SliceBox, ...] = ()
    mm: bool = False

    def __bool__(self) -> bool:
        return bool(self.points or self.boxes)


@dataclass(frozen=True)
class ObjectPrompts:
    """A user's prompts for one object, which becomes `label` in the label map.

    box is in 3D, boxes are on slices as those of ScanPrompts. centre: the middle of the first
    window, where it is not that of the points.
    """

    name: str = "object"
    label: int = 1
    points: tuple[Point, ...] = ()
    box: tuple[float, ...] | None = None
    boxes: tuple[SliceBox, ...] = ()
    centre: tuple[float, ...] | None = None


@dataclass(frozen=True)
class VolumePrompts:
    """The objects to segment in a scan with SAM-Med3D; mm: points and boxes are in millimetres."""

    objects: tuple[ObjectPrompts, ...]
    mm: bool = False


# ------------------------------------------------------------------ of one scan


def slice_prompts_of(
    args: Namespace, contents: Mapping[Path, Any] | None, scan: Path
) -> ScanPrompts:
    """The prompts of a scan for U-SAM: its part of the file (`read_prompts`), else the flags.

    Raises ValueError for wrong counts and values.
    """
    if contents is None:
        given = scan_prompts(args.point, args.box, args.slice, mm=args.mm)
        return replace(given, points=_from_lps(given.points)) if args.lps else given
    with _named_in_errors(args.prompts):
        content = _content_of(contents, scan)
        if is_markups(content):
            return _scan_prompts(as_slice_prompts(content))
        given = _scan_prompts(content)
        _check_lps(args, given)
        return replace(given, points=_from_lps(given.points)) if args.lps else given


def volume_prompts_of(
    args: Namespace, contents: Mapping[Path, Any] | None, scan: Path
) -> VolumePrompts:
    """The prompts of a scan for SAM-Med3D; see `slice_prompts_of`."""
    if contents is None:
        given = volume_prompts(args.point, args.box, mm=args.mm)
        return _objects_from_lps(given) if args.lps else given
    with _named_in_errors(args.prompts):
        content = _content_of(contents, scan)
        if is_markups(content):
            name = args.prompts.name.removesuffix(".json").removesuffix(".mrk")
            return _volume_prompts(as_volume_prompts(content, name or "object"))
        given = _volume_prompts(content)
        _check_lps(args, given)
        return _objects_from_lps(given) if args.lps else given


@contextmanager
def _named_in_errors(source: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _content_of(contents: Mapping[Path, Any], scan: Path) -> Any:
    if scan not in contents:
        raise ValueError(f"has no prompts for the scan {scan.name!r}")
    return contents[scan]


def _check_lps(args: Namespace, given: ScanPrompts | VolumePrompts) -> None:
    if args.lps and not given.mm:
        raise ValueError('--lps is for millimetres; the prompts need "mm": true')


def _from_lps(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points in LPS mm, as DICOM and ITK have them, in RAS mm."""
    return tuple((-x, -y, z, label) for x, y, z, label in points)


def _objects_from_lps(prompts: VolumePrompts) -> VolumePrompts:
    objects = []
    for one in prompts.objects:
        signs = (-1, -1, 1, -1, -1, 1)
        box = one.box and tuple(s * v for s, v in zip(signs, one.box, strict=True))
        objects.append(replace(one, points=_from_lps(one.points), box=box))
    return replace(prompts, objects=tuple(objects))


def scan_prompts(
    points: Sequence[Sequence[float]] | None,
    boxes: Sequence[Sequence[float]] | None,
    slices: Sequence[int] | None,
    *,
    mm: bool = False,
) -> ScanPrompts:
    """The prompts of --point x y z [label], --box x1 y1 x2 y2, --slice k and --mm.

    The n-th slice belongs to the n-th box. Raises ValueError for wrong counts and values.
    """
    boxes, slices = boxes or [], slices or []
    if slices and len(slices) != len(boxes):
        raise ValueError(f"{len(boxes)} --box but {len(slices)} --slice; give each --box one")
    numbers = slices or [None] * len(boxes)
    return ScanPrompts(
        points=tuple(_point(point) for point in points or []),
        boxes=tuple(_slice_box(k, box) for k, box in zip(numbers, boxes, strict=True)),
        mm=mm,
    )


def volume_prompts(
    points: Sequence[Sequence[float]] | None,
    boxes: Sequence[Sequence[float]] | None,
    *,
    mm: bool = False,
) -> VolumePrompts:
    """One object from --point x y z [label], --box x1 y1 z1 x2 y2 z2 and --mm.

    Raises ValueError for several boxes, wrong counts and values.
    """
    if boxes and len(boxes) > 1:
        raise ValueError(f"{len(boxes)} --box for one object; give several objects with --prompts")
    one = {"points": list(points or [])} | ({"box": boxes[0]} if boxes else {})
    return VolumePrompts((_object(one, 1),), mm)


# ------------------------------------------------------------------ a file of prompts


def read_prompts(path: Path, scans: Sequence[Path]) -> dict[Path, Any]:
    """The content of a prompts file, by scan, for those of `scans` that it has prompts for.

    For one scan the file is {"points": [[x, y, z], [x, y, z, label]], "boxes": [{"slice": k,
    "box": [x1, y1, x2, y2]}], "mm": false}, or for SAM-Med3D {"objects": [{"name": "liver",
    "label": 1, "points": [...], "box": [...]}], "mm": false}; for several, {"scans": {NAME: {...},
    ...}}, where NAME is the scan's file name, with folders in front if two scans share it. A file
    of markups from 3D Slicer (.mrk.json) is for one scan; see `markups`.
    Raises FileNotFoundError and ValueError, with one line, for anything else, for a NAME that is
    not among `scans` or fits two of them, and for one scan's prompts where `scans` are several.
    """
    content = _read_json(path)
    if not (isinstance(content, dict) and isinstance(content.get("scans"), dict)):
        if len(scans) > 1:
            raise ValueError(
                f"{path}: holds prompts of one scan, --predict names {len(scans)}; write "
                '{"scans": {"FILE NAME": {...}, ...}}'
            )
        return dict.fromkeys(scans, content)
    if content.keys() != {"scans"}:
        other = next(key for key in content if key != "scans")
        raise ValueError(f'{path}: {other!r:.80} beside "scans"; move it into each scan')
    found: dict[Path, Any] = {}
    for name, prompts in content["scans"].items():
        scan = _named(name, scans, path)
        if scan in found:
            raise ValueError(f"{path}: names {scan.name} twice, the second time as {name!r:.80}")
        found[scan] = prompts
    return found


def _named(name: str, scans: Sequence[Path], source: Path) -> Path:
    """The scan that `name`, a file name with or without folders in front, belongs to."""
    parts = Path(name).parts
    fitting = [scan for scan in scans if scan.absolute().parts[-len(parts) :] == parts]
    if not parts or not fitting:
        raise ValueError(
            f"{source}: has prompts for {name!r:.80}, which is not among the "
            f"{counted(len(scans), 'scan')} of --predict"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{source}: {name!r:.80} fits {counted(len(fitting), 'scan')}, {fitting[0]} and "
            f"{fitting[1]}; write the folder in front of the name"
        )
    return fitting[0]


def _read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError for names given twice, NaN and infinities as well."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompts file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, not a list of prompts")
    try:
        return json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's own errors among them
        raise ValueError(f"{path}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} is given twice")
        found[name] = value
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number")


# ------------------------------------------------------------------ values


def _scan_prompts(content: Any) -> ScanPrompts:
    if not isinstance(content, dict) or not content.keys() <= {"points", "boxes", "mm"}:
        raise ValueError('expected {"points": [...], "boxes": [...], "mm": false} for U-SAM')
    points = content.get("points", [])
    if not isinstance(points, list):
        raise ValueError('"points" must be a list')
    return ScanPrompts(
        points=tuple(_point(point) for point in points),
        boxes=_slice_boxes(content.get("boxes", [])),
        mm=_in_mm(content),
    )


def _slice_boxes(boxes: Any) -> tuple[SliceBox, ...]:
    if not isinstance(boxes, list):
        raise ValueError('"boxes" must be a list')
    for box in boxes:
        if not isinstance(box, dict) or not {"box"} <= box.keys() <= {"box", "slice"}:
            raise ValueError(f'a box is {{"slice": k, "box": [x1, y1, x2, y2]}}, found {box!r:.80}')
    return tuple(_slice_box(box.get("slice"), box["box"]) for box in boxes)


def _volume_prompts(content: Any) -> VolumePrompts:
    if not isinstance(content, dict) or not {"objects"} <= content.keys() <= {"objects", "mm"}:
        raise ValueError('expected {"objects": [...], "mm": false} for SAM-Med3D')
    if not isinstance(content["objects"], list) or not content["objects"]:
        raise ValueError('"objects" must be a list of at least one object')
    objects = tuple(_object(one, number) for number, one in enumerate(content["objects"], start=1))
    for key in ("name", "label"):
        values = [getattr(one, key) for one in objects]
        double = [value for value in values if values.count(value) > 1]
        if double:
            raise ValueError(f"two objects have the {key} {double[0]!r:.80}; each needs its own")
    return VolumePrompts(objects, _in_mm(content))


def _in_mm(content: Mapping[str, Any]) -> bool:
    mm = content.get("mm", False)
    if not isinstance(mm, bool):
        raise ValueError(f'"mm" must be true or false, found {mm!r:.80}')
    return mm


def _object(content: Any, number: int) -> ObjectPrompts:
    if not isinstance(content, dict) or not content.keys() <= OBJECT_KEYS:
        raise ValueError(f"an object has {', '.join(sorted(OBJECT_KEYS))}; found {content!r:.80}")
    points, label = content.get("points", []), content.get("label", number)
    name = content.get("name", "object" if number == 1 else f"object {number}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"an object's name must be text, found {name!r:.80}")
    if isinstance(label, bool) or not isinstance(label, int) or not 1 <= label <= MAX_LABEL:
        raise ValueError(
            f"{name}: label {label!r:.80}; expected a whole number from 1 to {MAX_LABEL}"
        )
    if not isinstance(points, list):
        raise ValueError(f"{name}: points must be a list of [x, y, z] or [x, y, z, label]")
    box, centre = content.get("box"), content.get("centre")
    return ObjectPrompts(
        name=name,
        label=label,
        points=tuple(_point(point) for point in points),
        box=None if box is None else _numbers(box, (6,), "a box is x1 y1 z1 x2 y2 z2"),
        boxes=_slice_boxes(content.get("boxes", [])),
        centre=None if centre is None else _numbers(centre, (3,), "a centre is x y z"),
    )


def _point(values: Any) -> Point:
    x, y, z, *label = _numbers(values, (3, 4), "a point is x y z or x y z label")
    if label and label[0] not in (0, 1):
        raise ValueError(f"a point's label is 1 (object) or 0 (background), found {label[0]:g}")
    return x, y, z, int(label[0]) if label else 1


def _slice_box(number: Any, values: Any) -> tuple[int | None, float, float, float, float]:
    x1, y1, x2, y2 = _numbers(values, (4,), "a box is x1 y1 x2 y2")
    if x1 > x2 or y1 > y2:
        raise ValueError(f"box {x1:g} {y1:g} {x2:g} {y2:g}: expected x1 <= x2 and y1 <= y2")
    is_index = type(number) is int and 0 <= number < MAX_INDEX
    if number is not None and not is_index:
        raise ValueError(f"a slice is an index of 0 or more, found {number!r:.80}")
    return number, x1, y1, x2, y2


def _numbers(values: Any, counts: tuple[int, ...], expected: str) -> tuple[float, ...]:
    fits = isinstance(values, list | tuple) and len(values) in counts
    numbers = tuple(map(_number, values)) if fits else ()
    if not fits or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{expected}, found {values!r:.80}")
    return numbers


def _number(value: Any) -> float:
    """A JSON number as float; infinity for one too large, NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
