"""A volume and a user's clicks in, one label map with every object out; no ground truth anywhere.

u-sam.py reads the prompts and the scan and calls `segment`. Points are (x, y, z, label): indices of
a voxel along the axes of the file as stored, from 0, or RAS millimetres; boxes are their first and
last voxel, (x1, y1, z1, x2, y2, z2).
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.crops import click_origin, crop_reader
from dataset.files import write_json
from dataset.scans.find import find_scans, output_names
from dataset.scans.volumes import ScanVolume, read_label_volume, read_volume
from dataset.scans.window import apply_window
from usam.models.sam_med3d import THRESHOLD, SamMed3d
from usam.prediction.output import (
    class_colors,
    class_volumes,
    count_voxels,
    montage_slices,
    save_montage,
)
from usam.prediction.windows import MAX_WINDOWS, Encoder, Session
from usam.runtime import processes
from usam.runtime.precision import Precision
from usam.weights.sam_med3d import load_or_initialize

MAX_JSON_BYTES = 64 << 20
KEYS = {"name", "label", "points", "box"}

Place = Callable[[np.ndarray, int], np.ndarray]
ToVoxels = Callable[[np.ndarray], np.ndarray]


def predict(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> None:
    """Segment the scans of --predict, each process its share; raises ValueError if one failed."""
    scans = find_scans(args.predict)
    if len(scans) > 1 and not args.prompts:
        raise ValueError(f"--point and --box mark one scan, --predict names {len(scans)}; "
                         "use --prompts FILE")  # fmt: skip
    if len(scans) > 1 and args.init_mask:
        raise ValueError(f"--init_mask is for one scan, --predict names {len(scans)}")
    model = load_or_initialize(args, saved).to(precision.device).eval()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    named = list(zip(scans, output_names(scans), strict=True))
    failures = 0
    for path, name in named[processes.rank() :: processes.world_size()]:
        try:
            print(predict_volume(args, precision, model, path, name), flush=True)
        except (ValueError, OSError) as error:
            if len(scans) == 1:
                raise
            failures += 1
            print(f"u-sam.py: error: {error}", file=sys.stderr, flush=True)
    failures = int(processes.reduce_sum(torch.tensor(failures)))
    if failures:
        raise ValueError(f"{failures} of {len(scans)} scans were not segmented, see above")


def predict_volume(
    args: Namespace, precision: Precision, model: SamMed3d, path: Path, name: str
) -> str:
    """Write NAME_seg.nii.gz and NAME_seg.json of one scan; lines on what was found."""
    if args.prompts:
        prompts = read_prompts3d(args.prompts, path.name)
    else:
        prompts = prompts3d_from_flags(args.point, args.box, mm=args.mm)
    scan = read_volume(path, args.channel)
    known = read_label_volume(args.init_mask, scan.grid) if args.init_mask else None
    label, rows = segment(
        encoder_of(scan.image, model, precision), prompts,
        to_voxels=partial(scan.clicks, mm=prompts.mm), place=click_origin, init_mask=known,
    )  # fmt: skip
    target = args.output_dir / f"{name}_seg.nii.gz"
    scan.save(target, label)
    rows = with_volumes(rows, label, scan)
    facts = {
        "input": path.name, "checkpoint": str(args.resume or args.sam_weight),
        "model": f"sam-med3d {args.sam_model}",
    }  # fmt: skip
    write_rows(args.output_dir / f"{name}_seg.json", rows, facts)
    if args.overlay:
        draw(args.output_dir / f"{name}_overlay.png", scan, label, rows)
    told = [f"{row['name']} {row['volume_ml']:.1f} ml, {row['points']} points, "
            f"{row['windows']} windows" for row in rows]  # fmt: skip
    for row in rows:
        if "clicked" in row.get("box", ""):
            told.append(f"{row['name']}: this model knows no boxes; {row['box']}")
        if row["stopped_early"]:
            told.append(f"{row['name']}: goes on after {MAX_WINDOWS} windows; "
                        "click again where it ends")  # fmt: skip
    return f"{target}: " + "\n  ".join(told)


def with_volumes(
    rows: list[dict[str, Any]], label: np.ndarray, scan: ScanVolume
) -> list[dict[str, Any]]:
    """The objects' rows with their voxels in the scan and their volumes in ml."""
    labels = [row["label"] for row in rows]
    voxels = count_voxels(scan.restore(label), 256)[labels].tolist()
    names = [row["name"] for row in rows]
    sizes = class_volumes(voxels, names, [""] * len(rows), scan.grid.header.voxel_ml)
    return [
        row | {"voxels": size["voxels"], "volume_ml": size["volume_ml"]}
        for row, size in zip(rows, sizes, strict=True)
    ]


def draw(path: Path, scan: ScanVolume, label: np.ndarray, rows: list[dict[str, Any]]) -> None:
    """Axial slices through the objects as one PNG, upright, at 1.5 mm."""
    slices, labels = (  # RAS (x, y, z) -> rows to posterior, columns to the patient's left
        volume[::-1, ::-1].transpose(2, 1, 0) for volume in (scan.image, label)
    )
    numbers = montage_slices(np.count_nonzero(labels, axis=(1, 2)))
    shown = dict(zip(numbers, apply_window(slices[numbers], "percentile"), strict=True))
    names = {row["label"]: row["name"] for row in rows}
    classes = [names.get(number, "") for number in range(max(names) + 1)]
    save_montage(
        path, numbers, shown.__getitem__, labels, classes=classes,
        colors=class_colors(None, len(classes)), title=path.name.removesuffix("_overlay.png"),
    )  # fmt: skip


def encoder_of(image: np.ndarray, model: SamMed3d, precision: Precision) -> Encoder:
    """What encodes windows of a volume (X, Y, Z) at 1.5 mm, cut and scaled as in training."""
    return Encoder(model, image.shape, read=crop_reader(image), precision=precision)


@dataclass(frozen=True)
class ObjectPrompts:
    """What a user marked of one object, which becomes `label` in the label map."""

    name: str = "object"
    label: int = 1
    points: tuple[tuple[float, float, float, int], ...] = ()
    box: tuple[float, ...] | None = None


@dataclass(frozen=True)
class VolumePrompts:
    """The objects wanted in one scan; mm: points and boxes are in RAS millimetres."""

    objects: tuple[ObjectPrompts, ...]
    mm: bool = False


# ------------------------------------------------------------------ what the user marked


def prompts3d_from_flags(
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


def read_prompts3d(path: Path, name: str) -> VolumePrompts:
    """The objects to segment in the scan `name` (its file's name), from a JSON file.

    {"objects": [{"name": "liver", "label": 1, "points": [[x, y, z], [x, y, z, 0]], "box": [...]}],
    "mm": false}, or {"scans": {NAME: {...}}} for several scans. Without "label" objects are
    numbered in order. Raises FileNotFoundError and ValueError, with one line, for anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, not a list of prompts")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("scans"), dict):
            if name not in content["scans"]:
                raise ValueError(f"names no scan {name!r}")
            content = content["scans"][name]
        return _volume_prompts(content)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's own errors among them
        raise ValueError(f"{path}: {error}") from None


def _volume_prompts(content: Any) -> VolumePrompts:
    if not isinstance(content, dict) or not {"objects"} <= content.keys() <= {"objects", "mm"}:
        raise ValueError('wanted {"objects": [...], "mm": false}')
    if not isinstance(content["objects"], list) or not content["objects"]:
        raise ValueError('"objects" must be a list of at least one object')
    if not isinstance(content.get("mm", False), bool):
        raise ValueError('"mm" must be true or false')
    objects = tuple(_object(one, number) for number, one in enumerate(content["objects"], start=1))
    for what in ("name", "label"):
        values = [getattr(one, what) for one in objects]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ValueError(f"two objects have the {what} {twice[0]!r}; each needs its own")
    return VolumePrompts(objects, content.get("mm", False))


def _object(content: Any, number: int) -> ObjectPrompts:
    if not isinstance(content, dict) or not content.keys() <= KEYS:
        raise ValueError(f"an object has {', '.join(sorted(KEYS))}; found {content!r:.80}")
    points, label = content.get("points", []), content.get("label", number)
    name = content.get("name", "object" if number == 1 else f"object {number}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"an object's name is a text, found {name!r:.80}")
    if isinstance(label, bool) or not isinstance(label, int) or not 1 <= label <= 255:
        raise ValueError(f"{name}: label {label!r:.80}; wanted a whole number from 1 to 255")
    if not isinstance(points, list):
        raise ValueError(f"{name}: points must be a list of [x, y, z] or [x, y, z, label]")
    box = content.get("box")
    return ObjectPrompts(
        name=name,
        label=label,
        points=tuple(_point(point) for point in points),
        box=None if box is None else _numbers(box, (6,), "a box is x1 y1 z1 x2 y2 z2"),
    )


def _point(values: Any) -> tuple[float, float, float, int]:
    x, y, z, *label = _numbers(values, (3, 4), "a point is x y z or x y z label")
    if label and label[0] not in (0, 1):
        raise ValueError(f"a point's label is 1 (object) or 0 (not), found {label[0]:g}")
    return x, y, z, int(label[0]) if label else 1


def _numbers(values: Any, lengths: tuple[int, ...], wanted: str) -> tuple[float, ...]:
    fits = isinstance(values, list | tuple) and len(values) in lengths
    if not fits or any(
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        for value in values
    ):
        raise ValueError(f"{wanted}, found {values!r:.80}")
    return tuple(float(value) for value in values)


# ------------------------------------------------------------------ segmenting


def segment(
    encoder: Encoder,
    prompts: VolumePrompts,
    *,
    to_voxels: ToVoxels,
    place: Place,
    init_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Label map (X, Y, Z) uint8 of the encoder's volume, and a row of facts for each object.

    to_voxels: a user's points (P, 3) -> voxels (P, 3) of the volume, ValueError outside it.
    place: voxels (P, 3) and a side -> origin of the window around them. init_mask (X, Y, Z):
    labels to refine, by the objects' own. Clicks are made one after the other, as in training.
    Where objects overlap the higher logit decides. Raises ValueError where an object has nothing
    to start from.
    """
    label = np.zeros(encoder.shape, dtype=np.uint8)
    best = torch.full(encoder.shape, THRESHOLD, device=encoder.precision.device)
    for one in prompts.objects:  # all are checked before the first is computed
        _check(one, init_mask)
    marked = [_clicks_and_box(one, to_voxels) for one in prompts.objects]
    takes_boxes, rows = encoder.model.config["num_point_embeddings"] == 4, []
    for one, (clicks, box) in zip(prompts.objects, marked, strict=True):
        known = None if init_mask is None else torch.from_numpy(init_mask == one.label)
        session = Session(encoder, known if known is not None and known.any() else None)
        session.look(_first_window(clicks, box, known, place, encoder.model.side))
        for voxel, sign in clicks:
            session.click(voxel, sign, box if takes_boxes else None)
        answer = session.logits
        wins = answer > best
        best = torch.where(wins, answer, best)
        label[wins.cpu().numpy()] = one.label
        rows.append(_facts(one, session, takes_boxes))
    return label, rows


def _facts(one: ObjectPrompts, session: Session, takes_boxes: bool) -> dict[str, Any]:
    """What is told of a segmented object."""
    facts = {"name": one.name, "label": one.label, "points": len(one.points)}
    if one.box:
        facts["box"] = "given to the model" if takes_boxes else "its centre was clicked"
    return facts | {"windows": session.num_windows, "stopped_early": session.stopped_early}


def _check(one: ObjectPrompts, init_mask: np.ndarray | None) -> None:
    """Raises ValueError if nothing says where the object is."""
    if init_mask is not None and (init_mask == one.label).any():
        return
    if one.box is None and not any(point[3] == 1 for point in one.points):
        what = "has only points outside it" if one.points else "has no prompt"
        rest = f", and --init_mask has no label {one.label}" if init_mask is not None else ""
        raise ValueError(f"{one.name} {what}{rest}; give --point X Y Z, --box or --prompts FILE")


def _clicks_and_box(
    one: ObjectPrompts, to_voxels: ToVoxels
) -> tuple[list[tuple[tuple[int, ...], int]], tuple | None]:
    """An object's clicks (voxel, label) and its box (first, last voxel), in the volume.

    A box becomes a first click in its centre.
    """
    points = np.array([point[:3] for point in one.points], dtype=np.float64).reshape(-1, 3)
    signs = [point[3] for point in one.points]
    clicks = list(zip(map(tuple, to_voxels(points).tolist()), signs, strict=True))
    if one.box is None:
        return clicks, None
    corners = to_voxels(np.array(one.box).reshape(2, 3))
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre = tuple(((low + high) // 2).tolist())
    return [(centre, 1), *clicks], (tuple(low.tolist()), tuple(high.tolist()))


def _first_window(
    clicks: list, box: tuple | None, known: torch.Tensor | None, place: Place, side: int
) -> tuple[int, ...]:
    """Where the first window begins: around the box, else the object's clicks, else the mask."""
    inside = [voxel for voxel, sign in clicks if sign == 1]
    if box is not None:
        inside = [tuple((low + high) // 2 for low, high in zip(*box, strict=True))]
    elif not inside:
        found = known.nonzero()
        inside = [((found.amin(dim=0) + found.amax(dim=0)) // 2).tolist()]
    return tuple(int(index) for index in place(np.array(inside), side))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Save what was segmented, from how many clicks and windows, as strict JSON."""
    content = {**facts, "objects": list(rows)}
    write_json(path, content, 2, sort_keys=False)
