"""SAM-Med3D on scans: segments a user's objects from clicks into one label map."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.crops import click_origin
from dataset.scans.header import Scan
from dataset.scans.volumes import ScanVolume, read_label_volume, volume_of
from dataset.text import counted, printable
from usam.models.sam_med3d import THRESHOLD
from usam.prediction.planes import draw_objects
from usam.prediction.prompts import volume_prompts_of
from usam.prediction.results import Segmentation, count_voxels, measured, measured_text
from usam.prediction.volume_prompts import MarkedObject, marked
from usam.prediction.windows import MAX_WINDOWS, EmbeddingCache, Session, Voxel, centred
from usam.runtime.precision import Precision
from usam.weights.sam_med3d import PUBLISHED, load_or_initialize


class VolumeModel:
    """SAM-Med3D, which segments the objects that a user marks in a scan.

    Raises what load_or_initialize raises.
    """

    def __init__(self, args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> None:
        self.model = load_or_initialize(args, saved).to(precision.device).eval()
        self.precision = precision
        self.facts = {
            "checkpoint": str(args.resume or args.sam_weight or PUBLISHED),
            "model": f"sam-med3d {args.sam_model}",
        }

    def segment(
        self,
        stored: Scan,
        args: Namespace,
        contents: Mapping[Path, Any] | None,
        probability_file: None = None,
    ) -> Segmentation:
        """The objects that are marked in a scan (`volume_prompts_of`); it has no probabilities."""
        prompts = volume_prompts_of(args, contents, stored.path)
        scan, warnings = volume_of(stored), intensity_warnings(stored.array)
        known = read_label_volume(args.init_mask, scan.grid) if args.init_mask else None
        objects = [marked(one, scan, mm=prompts.mm) for one in prompts.objects]
        cache = EmbeddingCache(self.model, scan.image, self.precision)
        label, rows = segment_objects(cache, objects, known)
        if stored.is_constant:
            label[:] = 0
        return found_in(scan, label, rows, self.facts, warnings, objects)


def intensity_warnings(array: np.ndarray) -> list[str]:
    """A warning if a scan's values are unlike those the model was trained on."""
    low, high = float(array.min()), float(array.max())
    if low == high:
        return [f"every voxel is {low:g}; nothing to segment"]
    if high <= 0:
        return [f"no voxel is above 0, where the model expects the body; the scan's values are "
                f"{low:g} to {high:g}"]  # fmt: skip
    return []


def segment_objects(
    cache: EmbeddingCache, objects: Sequence[MarkedObject], init_mask: np.ndarray | None = None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Label map (X, Y, Z) uint8 of the cache's volume, and a row of facts for each object.

    init_mask (X, Y, Z): labels to refine, by the objects' own. Clicks are made one after the
    other, as in training. Where objects overlap the higher logit decides. Raises ValueError where
    an object has nothing to start from.
    """
    for one in objects:  # all are checked before the first is computed
        _check(one, init_mask, len(objects))
    label = np.zeros(cache.shape, dtype=np.uint8)
    best = torch.full(cache.shape, THRESHOLD, device=cache.precision.device)
    rows = []
    for one in objects:
        session = _clicked(cache, one, init_mask)
        answer = session.logits
        wins = answer > best
        best = torch.where(wins, answer, best)
        label[wins.cpu().numpy()] = one.label
        rows.append(_facts(one, session, init_mask))
    return label, rows


def _clicked(cache: EmbeddingCache, one: MarkedObject, init_mask: np.ndarray | None) -> Session:
    """A session on one object after its mask, its box and all of its clicks.

    For a model without boxes a box is no more than a first click in its centre.
    """
    known = None if init_mask is None else torch.from_numpy(init_mask == one.label)
    session = Session(cache, known if known is not None and known.any() else None)
    session.look(_first_window(one, known, cache.model.side))
    for voxel, sign in one.box_and_clicks:
        session.click(voxel, sign, one.box if cache.takes_boxes else None)
    return session


def _first_window(one: MarkedObject, known: Tensor | None, side: int) -> Voxel:
    """Where the first window begins: around its chosen centre, the box, the clicks or the mask."""
    if one.centre is not None:
        return centred(one.centre, side)
    inside = [voxel for voxel, sign in one.clicks if sign == 1]
    if one.box is not None:
        inside = [one.box_centre]
    elif not inside:
        found = known.nonzero()
        inside = [((found.amin(dim=0) + found.amax(dim=0)) // 2).tolist()]
    return tuple(int(index) for index in click_origin(np.array(inside), side))


def _check(one: MarkedObject, init_mask: np.ndarray | None, num_objects: int) -> None:
    """Raises ValueError if nothing says where the object is, or if the mask lacks it."""
    in_mask = init_mask is not None and bool((init_mask == one.label).any())
    has_prompt = any(sign == 1 for _, sign in one.box_and_clicks)
    if in_mask or (has_prompt and (init_mask is None or num_objects > 1)):
        return
    if init_mask is not None:
        ids = ", ".join(map(str, np.unique(init_mask[init_mask > 0])[:9])) or "none"
        raise ValueError(
            f"--init_mask has no label {one.label} ({one.name}), its labels are: {ids}; relabel "
            'it, or give the object its "label" in --prompts'
        )
    problem = "has only points outside it" if one.clicks else "has no prompt"
    raise ValueError(f"{one.name} {problem}; give --point X Y Z, --box or --prompts FILE")


def _facts(one: MarkedObject, session: Session, init_mask: np.ndarray | None) -> dict[str, Any]:
    """The description's entries about a segmented object."""
    facts: dict[str, Any] = {"name": one.name, "label": one.label, "points": len(one.clicks)}
    if one.box:
        facts["box"] = "given to the model" if session.cache.takes_boxes else "centre clicked"
    if init_mask is not None:
        facts["init_mask"] = session.has_mask
    return facts | {"windows": session.num_windows, "stopped_early": session.stopped_early}


# ------------------------------------------------------------------ results


def found_in(
    scan: ScanVolume,
    label: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    warnings: Sequence[str],
    objects: Sequence[MarkedObject],
) -> Segmentation:
    """The result for a label (X, Y, Z) at the volume's voxels; rows: see `segment_objects`."""
    header, stored = scan.grid.header, scan.restore(label)
    voxels = count_voxels(stored, 256).tolist()
    rows = [{**row, **measured(voxels[row["label"]], header.voxel_ml)} for row in rows]
    of_objects = [line for row in rows for line in _warnings(row)]

    def draw(path: Path, title: str) -> None:
        draw_objects(path, scan, label, objects, title=title)

    return Segmentation(
        stored, header, "objects", rows,
        {"input": header.path.name, "shape": list(header.shape), **facts},
        [*header.remarks, *warnings, *of_objects], "\n  ".join(map(_line, rows)), draw,
    )  # fmt: skip


def _line(row: Mapping[str, Any]) -> str:
    """An object's line for the terminal."""
    points, windows = counted(row["points"], "point"), counted(row["windows"], "window")
    return f"{measured_text(row)}, {points}, {windows}"


def _warnings(row: Mapping[str, Any]) -> list[str]:
    """Warnings about an object, one line each."""
    name, lines = printable(row["name"]), []
    if row.get("box") == "centre clicked":
        lines.append(
            f"{name}: this checkpoint does not support boxes; used the box centre as a click"
        )
    if row.get("init_mask") is False:
        lines.append(f"{name}: --init_mask has no label {row['label']}; not used for it")
    if row["stopped_early"]:
        lines.append(
            f"{name}: stopped after {MAX_WINDOWS} windows, the object may reach further; click "
            "again where it ends"
        )
    if not row["voxels"]:
        lines.append(f"{name}: no voxel found")
    return lines
