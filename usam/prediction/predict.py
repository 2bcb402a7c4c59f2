"""Segmenting scans with any model; --predict and Python go the same way."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.scans.read import read_scan
from dataset.scans.window import parse_window
from usam.prediction.prompts import read_prompts
from usam.prediction.results import ResultFiles
from usam.prediction.scans import predict_each, scans_to_predict
from usam.runtime.precision import Precision

if TYPE_CHECKING:
    from usam.prediction.pretrained import PretrainedModel
    from usam.prediction.slices import SliceModel
    from usam.prediction.volumes import VolumeModel

    Model = SliceModel | VolumeModel | PretrainedModel


def predict(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> None:
    """Segment the scans of --predict, each process its share; raises ValueError if one failed."""
    scans = scans_to_predict(args)
    if args.model == "sam-med3d" and len(scans) > 1 and not args.prompts:
        raise ValueError(f"--predict names {len(scans)} scans; give their prompts with --prompts")
    contents = read_prompts(args.prompts, scans) if args.prompts else None
    if args.window:
        parse_window(args.window)  # a wrong one is named before the model is read
    model = load(args, precision, saved)

    def segment(path: Path, files: ResultFiles) -> str:
        scan = read_scan(path, args.channel, args.series)
        found = model.segment(scan, args, contents, files.probabilities)
        return found.write(files, overlay=args.overlay)

    predict_each(args, scans, segment, precision.device)


def load(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> Model:
    """The model of --resume, whose content is `saved`, else that of --sam_weight."""
    if args.model == "sam-med3d":
        from usam.prediction.volumes import VolumeModel as Kind
    elif saved is None:
        from usam.prediction.pretrained import PretrainedModel as Kind
    else:
        from usam.prediction.slices import SliceModel as Kind
    return Kind(args, precision, saved)


def prompts_in_memory(prompts: Any, scan: Path) -> dict[Path, Any]:
    """What `read_prompts` gives for a scan, of prompts that are no file but a dict of their own."""
    try:
        content = json.loads(json.dumps(prompts, default=lambda value: value.tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"prompts: expected what a file of --prompts holds ({error})") from None
    return {scan: content}
