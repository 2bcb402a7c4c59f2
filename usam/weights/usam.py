"""Weights of other programs: SAM's official checkpoints and those of the published U-SAM code.

u-sam.py starts training from the former (`initialize`) and reads its own and the latter for
--resume (`read_checkpoint`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usam.models.lora import is_lora, merged
from usam.models.sam_encoder import PATCH
from usam.models.two_way import meet_at_positions
from usam.models.usam import SAM_SIZES, USam, build_usam
from usam.weights import sam as sam_file
from usam.weights.checkpoint_parts import FORMAT, MAX_SIDE, PLAIN, check_parts, whole_number
from usam.weights.folds import check_start
from usam.weights.foreign import stride_of
from usam.weights.sam import resize
from usam.weights.small_checkpoint import completed
from usam.weights.state_dict import check_names, check_tensors, load_model_state
from usam.weights.torch_files import is_state_dict, read_file

# In published U-SAM checkpoints, though no logit depends on them.
UNUSED_LAYERS = (
    "image_encoder.patch_embed.proj",
    *(f"prompt_encoder.mask_downscaling.{index}" for index in (0, 1, 3, 4, 6)),
    *(f"mask_decoder.iou_prediction_head.layers.{index}" for index in (0, 1, 2)),
    *(f"mask_decoder.lowres_output.{index}" for index in (0, 1, 3)),
)
UNUSED = frozenset(
    [f"sam.{layer}.{leaf}" for layer in UNUSED_LAYERS for leaf in ("weight", "bias")]
    + [
        f"sam.mask_decoder.lowres_output.1.{leaf}"
        for leaf in ("running_mean", "running_var", "num_batches_tracked")
    ]
)


def initialize(
    model: USam,
    sam_model: str,
    sam_weight: str | Path | None,
    *,
    init: Path | None = None,
    fold: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> str:
    """Initialise `model` from SAM's weights; returns one line on what was loaded.

    init: a checkpoint of U-SAM to start from instead, that must not have seen the cases of `fold`
    of `data`, what checkpoints say of it; see `folds.check_start`. sam_weight: a file, `none`
    for random weights, or None for the official file of `sam_model` in weight/. A missing official
    file is downloaded. Raises FileNotFoundError where that fails and ValueError where a file does
    not fit.
    """
    if init is not None:
        return start_from(model, init, sam_weight, fold=fold, data=data)
    path = sam_file.find(sam_model, sam_weight)
    if path is None:
        meet_at_positions(model.sam["mask_decoder"].transformer)
        return f"{sam_model} starts from random weights"
    return str(sam_file.load_sam_checkpoint(model, path))


def stride_to_start_from(
    sam_model: str, sam_weight: str | Path | None, init: Path | None = None
) -> int | None:
    """The `stride` that `build_usam` needs for weights that `initialize` then puts in.

    None for an encoder other than vit_t and for random weights. Raises as `initialize` does.
    """
    if sam_model != "vit_t":
        return None
    if init is not None:
        return stride_of(sam_part(completed(read_checkpoint(init), init, sam_weight)["model"]))
    path = sam_file.find(sam_model, sam_weight)
    return None if path is None else stride_of(sam_file.read_sam(path, sam_model))


def sam_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of U-SAM's weights that SAM has as well, under SAM's own names."""
    return {n.removeprefix("sam."): value for n, value in state.items() if n.startswith("sam.")}


def start_from(
    model: USam,
    path: Path,
    sam_weight: str | Path | None = None,
    *,
    fold: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> str:
    """Load the fitting weights of a U-SAM checkpoint into `model`; returns a line on the rest.

    Tables of positions are resized to the model's token grid; what depends on the classes stays
    at init where their number differs. LoRA goes on as such where `model` has one and is added to
    the weights otherwise. Raises ValueError where nothing of the encoder fits or the other U-SAM
    has another --adapter or has seen the cases of `fold` (see `initialize`).
    """
    content = read_checkpoint(path)
    if data is not None:
        check_start(path, content, fold, data)
    saved, own = completed(content, path, sam_weight), model.state_dict()
    adapter = saved["data"].get("adapter", "u")
    if adapter != model.adapter:
        raise ValueError(f"{path} was trained with --adapter {adapter}; pass the same")
    state = saved["model"] if any(map(is_lora, own)) else merged(saved["model"])
    known = {
        n: resize(v, n.removeprefix("sam."), own[n].shape) for n, v in state.items() if n in own
    }
    fitting = {name: value for name, value in known.items() if value.shape == own[name].shape}
    if "sam.mask_decoder.mask_tokens.weight" not in fitting:  # a token and its MLP go together
        fitting = {n: value for n, value in fitting.items() if ".output_hypernetworks" not in n}
    blocks = ("sam.image_encoder.blocks.", "sam.image_encoder.layers.")
    if not any(name.startswith(blocks) for name in fitting):
        raise ValueError(f"{path}: no encoder block fits; was it trained with another --sam_model?")
    check_tensors(path, fitting, own)
    model.load_state_dict(fitting, strict=False)
    left = sorted(own.keys() - fitting.keys())
    return f"{path}: {len(fitting)} tensors loaded; new: {', '.join(left) or 'none'}"


# ------------------------------------------------------------------ U-SAM checkpoints


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of u-sam.py, or a published U-SAM checkpoint in the same form.

    A published one has weights, args and data only, and `points_are_row_col` is true of it.
    Raises FileNotFoundError if there is none, ValueError if it is damaged or neither of the two.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train first or name another --resume")
    content = read_file(path)
    if is_published(content):
        return from_published(content, path)
    whole = isinstance(content, Mapping) and {"model", "args", "data"} <= content.keys()
    if not whole or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT} written by u-sam.py")
    check_parts(content, path)
    return dict(content)


def load_usam(
    saved: Mapping[str, Any], source: Path, sam_weight: str | Path | None, *, merge: bool
) -> USam:
    """The U-SAM of a checkpoint, with its adapter and its tuning.

    merge: add its LoRA to the weights, to evaluate and predict as fast as without. source,
    sam_weight: see `usam.small_checkpoint.completed`. Raises ValueError where weights are missing
    or do not fit.
    """
    data, state = saved["data"], completed(saved, source, sam_weight)["model"]
    tuning = data.get("tuning", "full")
    if merge:
        state, tuning = merged(state), "full"
    model = build_usam(
        saved["args"]["sam_model"], len(data["classes"]), data["img_size"],
        data.get("adapter", "u"), tuning, stride_of(sam_part(state)),
    )  # fmt: skip
    load_model_state(model, state, source)
    if data.get("preparation", model.preparation) != model.preparation:
        raise ValueError(
            f"{source} was trained on the scale {data['preparation']!r:.20}, its weights are for "
            f"{model.preparation!r}; the checkpoint is damaged"
        )
    return model


def is_published(content: Any) -> bool:
    """Whether a loaded file is a checkpoint of the published U-SAM code."""
    return (
        isinstance(content, Mapping)
        and {"model", "args"} <= content.keys()
        and isinstance(content["args"], argparse.Namespace)
    )


def points_are_row_col(checkpoint: Mapping[str, Any]) -> bool:
    """Whether its model was trained on (row, col) points, as the published code gave them."""
    return checkpoint["data"].get("point_order") == "row_col"


def from_published(content: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """A published checkpoint in the form of ours; see `read_checkpoint`.

    Its classes are numbered only and its model's sizes are read off its tensors. Raises
    ValueError naming tensors that are missing or unexpected; those without effect are left out.
    """
    if not is_state_dict(content["model"]):
        raise ValueError(f"{source}: checkpoint field 'model' must map names to tensors")
    state = {name.removeprefix("module."): value for name, value in content["model"].items()}
    state = {name: value for name, value in state.items() if name not in UNUSED}
    sam_model, num_classes, img_size = sizes(state, source)
    with torch.device("meta"):
        wanted = build_usam(sam_model, num_classes, img_size).state_dict().keys()
    check_names(source, missing=wanted - state.keys(), unknown=state.keys() - wanted)
    flags = {k: v for k, v in vars(content["args"]).items() if isinstance(v, PLAIN)}
    return {
        "format": FORMAT,
        "model": state,
        "args": flags | {"model": "u-sam", "sam_model": sam_model},
        "data": {
            "classes": ["background", *(f"class {i}" for i in range(1, num_classes))],
            "img_size": img_size,
            "window": None,
            "orientation": "stored",
            "spacing": None,
            "clahe": True,  # as published for CARE
            "prompt_mode": whole_number(flags.get("prompt_mode"), most=3),
            "point_order": "row_col",
        },
        "progress": {
            "epoch": whole_number(content.get("epoch"), most=10**9),
            "step": 0,
            "samples": 0,
        },
        "best": {"epoch": None, "mean_dice": None},
    }


def sizes(state: Mapping[str, Tensor], source: Path) -> tuple[str, int, int]:
    """Name of the SAM encoder, number of classes and image size that weights belong to."""
    position, output = "sam.image_encoder.pos_embed", "sam.mask_decoder.final_output.3.weight"
    check_names(source, missing={position, output} - state.keys(), unknown=set())
    if state[position].dim() != 4 or state[output].dim() < 1:
        raise ValueError(
            f"{source}: {position} is {tuple(state[position].shape)}, not (1, h, w, C)"
        )
    _, side, _, width = state[position].shape
    if side * PATCH > MAX_SIDE:
        raise ValueError(f"{source}: made for images of {side * PATCH} pixels")
    names = [name for name, size in SAM_SIZES.items() if size.width == width]
    if not names:
        raise ValueError(f"{source}: no SAM encoder is {width} channels wide")
    return names[0], len(state[output]), side * PATCH
