"""Checkpoints without SAM's frozen encoder: what they leave out, and how it is restored.

`usam.run_folder` leaves it out where `--small_checkpoints` asks for it; `usam.weights` brings it
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usam.models.lora import is_lora
from usam.models.usam import build_usam
from usam.weights import sam as sam_file
from usam.weights.foreign import stride_of


def base_of_run(
    saved: Mapping[str, Any] | None, *, small: bool, tuning: str, sam_weights: Path | None
) -> dict[str, str] | None:
    """What the small checkpoints of a training run record about their SAM file.

    None for whole checkpoints. saved: what the run goes on from. small: whether small ones are
    asked for. sam_weights: the file a fresh run starts from. Raises ValueError where checkpoints
    cannot be small.
    """
    base = saved["data"].get("base") if saved else None
    if base is not None or not small:
        return base
    if saved or sam_weights is None:
        raise ValueError(
            "--small_checkpoints leaves SAM's part out, so it needs a fresh run that starts from "
            "SAM's file: no --resume, --init or --sam_weight none"
        )
    if tuning == "full":
        raise ValueError(
            "--small_checkpoints needs --tuning lora or decoder; full trains the encoder"
        )
    return {"file": str(sam_weights), "sha256": sam_file.digest(sam_weights)}


def without_base(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights without those of its encoder that LoRA leaves as SAM has them."""
    return {name: value for name, value in state.items() if not is_base(name)}


def is_base(name: str) -> bool:
    """Whether a tensor of this name is of SAM's encoder and not LoRA's."""
    return name.startswith("sam.image_encoder.") and not is_lora(name)


def completed(
    saved: Mapping[str, Any], source: Path, sam_weight: str | Path | None
) -> dict[str, Any]:
    """A checkpoint with the encoder that a small one leaves out; others are returned unchanged.

    source: the checkpoint's path. sam_weight: SAM's file, as `--sam_weight` names it; without one
    it is looked for where it was and in weight/. Raises FileNotFoundError or ValueError that says
    which file is needed where that is missing or another.
    """
    data, base = saved["data"], saved["data"].get("base")
    if base is None:
        return dict(saved)
    path = find_base(base, source, sam_weight)
    if sam_file.digest(path) != base["sha256"]:
        raise ValueError(f"{path} is another file than the one {source} was trained on; {TO_DO}")
    sam_model = saved["args"].get("sam_model")
    state = sam_file.read_sam(path, sam_model)
    with torch.device("meta"):
        model = build_usam(
            sam_model, len(data["classes"]), data["img_size"], data["adapter"],
            stride=stride_of(state),
        )  # fmt: skip
    shapes = {n.removeprefix("sam."): v for n, v in model.state_dict().items() if is_base(n)}
    encoder = sam_file.encoder_of(path, state, shapes)
    whole = {f"sam.{name}": value for name, value in encoder.items()} | dict(saved["model"])
    return dict(saved) | {"model": whole}


TO_DO = "pass --sam_weight with the file its training started from"


def find_base(base: Mapping[str, str], source: Path, sam_weight: str | Path | None) -> Path:
    """The path of a small checkpoint's SAM file; FileNotFoundError says which file is needed."""
    given = [] if sam_weight in (None, "none") else [Path(sam_weight)]
    name = Path(base["file"]).name
    places = given or [Path(base["file"]), sam_file.SAM_FOLDER / name]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"{source} holds no encoder of its own and needs {name} (SHA-256 {base['sha256'][:12]}...);"
        f" none at {' or '.join(map(str, places))}; {TO_DO}"
    )
