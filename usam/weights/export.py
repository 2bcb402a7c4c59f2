"""Weights of a checkpoint as files for other programs: SAMed's LoRA, SAM-Med3D's published form."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dataset.files import atomic_write
from usam.runtime.processes import is_main, say
from usam.weights.lora import save_lora


def export(args: Namespace, saved: Mapping[str, Any]) -> None:
    """Write the file of --export_lora or --export_weights from the checkpoint of --resume.

    Raises ValueError where the file is the checkpoint itself, or exists without --overwrite.
    """
    if not is_main():
        return
    name = "export_lora" if args.export_lora else "export_weights"
    target: Path = getattr(args, name)
    if target.exists() and target.samefile(args.resume):
        raise ValueError(f"--{name} {target} is the checkpoint itself; choose another name")
    if target.exists() and not args.overwrite:
        raise ValueError(f"--{name}: {target} exists; choose another name or pass --overwrite")
    if args.export_lora:
        say(save_lora(saved["model"], target, with_decoder=args.adapter == "none"))
    else:
        say(save_published(saved, target))


def save_published(saved: Mapping[str, Any], path: Path) -> str:
    """Write a SAM-Med3D checkpoint as {"model_state_dict": weights}; one line that says so.

    Missing folders are made. Raises ValueError for weights that the published code would compute
    something else with, OSError naming the path where it cannot be written.
    """
    if saved["args"]["rel_pos"] != "published":
        raise ValueError(
            f"--export_weights: trained with --rel_pos {saved['args']['rel_pos']}, with which the "
            "published code would give other answers; train with --rel_pos published"
        )
    weights = dict(saved["model"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            torch.save({"model_state_dict": weights}, temporary)
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not write {path}: {error}") from error
    points = saved["data"]["num_point_embeddings"]
    note = "" if points == 2 else f"; it has {points} point embeddings, SAM-Med3D's code needs 2"
    return f"{len(weights)} tensors in {path}, in SAM-Med3D's format{note}"
