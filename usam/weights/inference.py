"""Trained models for evaluation and prediction: one checkpoint, or several averaged."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.sides import sides
from dataset.text import printable
from usam.models.ensemble import VIEWS, Averaged
from usam.runtime.processes import say
from usam.weights.folds import check_fold
from usam.weights.usam import load_usam, points_are_row_col, read_checkpoint

# What members must share: of a checkpoint's "data", and what it is where the key is missing.
SHARED = {
    "classes": None, "img_size": None, "input": "2d", "window": None, "orientation": None,
    "spacing": None, "clahe": False, "crop": 0.0, "body_crop": False,
}  # fmt: skip


def read_members(args: Namespace, saved: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Path and content of --resume, `saved`, and of the checkpoints to average it with."""
    others = [(path, averaged(read_checkpoint(path))) for path in args.ensemble or ()]
    return [(args.resume, saved), *others]


def load_for_inference(
    args: Namespace,
    device: torch.device,
    saved: dict[str, Any],
    fold_digest: str | None = None,
    members: Sequence[tuple[Path, dict[str, Any]]] | None = None,
) -> tuple[nn.Module, bool]:
    """The model that --eval and --predict use, and whether its points are (row, column).

    The model of --resume, `saved`, on `device`; or the average of several, or of the views of
    --tta. fold_digest: of the fold to evaluate, whose cases no model may have been trained on.
    members: of `read_members`, if they were read before.
    """
    members = members or read_members(args, saved)
    check_members(members, args.fold if args.eval else None, fold_digest)
    models = []
    for path, content in members:
        model = load_usam(content, path, args.sam_weight, merge=True)
        models.append((model.to(device), points_are_row_col(content)))
        say(f"{path}: {content['args']['sam_model']} at {args.img_size} pixels")
        if models[-1][1] and args.eval and args.prompt_mode > 1:
            say(f"{path} is a published checkpoint: its points are given as (row, column)")
    if len(models) == 1 and not args.tta:
        return models[0]
    found = sides(saved["data"]["classes"])
    if args.tta and found.unpaired:
        names = printable(", ".join(found.unpaired))
        say(f"warning: --tta mirrors {names}, which has no class for the other side")
    return Averaged(models, args.tta or "none", found.ids if found.any else None), False


def answers_text(args: Namespace) -> dict[str, str]:
    """The source of predictions, for reports: the checkpoints, and the views if several."""
    names = ", ".join(map(str, [args.resume, *(args.ensemble or ())]))
    facts = {"checkpoint": names + (", averaged" if args.ensemble else "")}
    if args.tta:
        facts["views"] = f"{args.tta}: {len(VIEWS[args.tta])} averaged"
    return facts


def averaged(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with its averaged weights, if it has them, in place of the last ones."""
    rest = {key: value for key, value in state.items() if key != "average"}
    if "average" in state:
        rest["model"] = {**state["model"], **state["average"]["weights"]}
    return rest


def check_members(
    members: Sequence[tuple[Path, Mapping[str, Any]]],
    fold: int | None,
    fold_digest: str | None = None,
) -> None:
    """Raises ValueError unless checkpoints (path, content) can be averaged, evaluated on `fold`.

    They must have learnt the same classes from slices prepared alike, at one size; the encoder's
    size and the training may differ. Published checkpoints do not know the names of their classes.
    With a fold each must have been trained with it, so that none has seen its cases. fold_digest:
    that of the data; checkpoints older than it are known by the fold's number only.
    """
    (first, content), *others = members
    wanted = _described(content["data"])
    for path, other in others:
        found = _described(other["data"])
        for name in SHARED:
            ours, theirs = wanted[name], found[name]
            if name == "classes" and any("point_order" in c["data"] for c in (content, other)):
                ours, theirs = len(ours), len(theirs)
            if ours != theirs:
                raise ValueError(
                    f"--resume: {path} has {name} {theirs}, {first} has {ours}; "
                    "only models of the same classes, size and input can be averaged"
                )
    for path, other in members if fold is not None else ():
        check_fold(str(path), other, fold, fold_digest)


def _described(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data.get(name, default) for name, default in SHARED.items()}
