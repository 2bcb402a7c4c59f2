"""Trained models for evaluation and prediction: one checkpoint, or several averaged."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import nn

from usam.models.ensemble import VIEWS, Averaged, check_members
from usam.runtime.processes import say
from usam.training.ema import averaged
from usam.weights.usam import load_usam, points_are_row_col, read_checkpoint


def load_for_inference(
    args: Namespace, device: torch.device, saved: dict[str, Any], fold_digest: str | None = None
) -> tuple[nn.Module, bool]:
    """The model that --eval and --predict use, and whether its points are (row, column).

    The model of --resume, `saved`, on `device`; or the average of several, or of the views of
    --tta. fold_digest: of the fold to evaluate, whose cases no model may have been trained on.
    """
    members = [(args.resume, saved)]
    members += [(path, averaged(read_checkpoint(path))) for path in args.ensemble or ()]
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
    return Averaged(models, args.tta or "none"), False


def answers_text(args: Namespace) -> dict[str, str]:
    """What an answer comes from, for reports: the checkpoints, and the views if several."""
    names = ", ".join(map(str, [args.resume, *(args.ensemble or ())]))
    facts = {"checkpoint": names + (", averaged" if args.ensemble else "")}
    if args.tta:
        facts["views"] = f"{args.tta}: {len(VIEWS[args.tta])} averaged"
    return facts
