"""Weights from elsewhere: SAM's official checkpoints and those of the published U-SAM code.

u-sam.py starts training from the former (`initialize`) and reads its own and the latter for
--resume (`read_checkpoint`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from usam.checkpoint import FORMAT
from usam.checkpoint_parts import MAX_SIDE, PLAIN, check_parts, whole_number
from usam.model import SAM_MODELS, USam, build_usam
from usam.sam_vit import PATCH
from usam.torch_files import is_state_dict, read_file, read_tensors

SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FOLDER = Path("weight")
SAM_FILES = {  # the digits are the first of the file's MD5
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}

# What becomes of each tensor, by the start of its name without `sam.`. A name on neither side of
# these lists, or missing where it is wanted, is an error: nothing is skipped in silence.
TAKEN = (
    "image_encoder.",
    "prompt_encoder.",
    "mask_decoder.transformer.",
    "mask_decoder.iou_token.",
)
LEFT_AT_INIT = (
    "backbone.",
    "mask_decoder.mask_tokens.",  # 32 here, 4 in SAM
    "mask_decoder.output_hypernetworks_mlps.",
    "mask_decoder.up",
    "mask_decoder.final_output.",
)
IGNORED = (
    "image_encoder.patch_embed.",
    "prompt_encoder.mask_downscaling.",
    "mask_decoder.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.",
    "mask_decoder.output_upscaling.",
    "mask_decoder.iou_prediction_head.",
)
RESIZABLE = re.compile(r"image_encoder\.(pos_embed|blocks\.\d+\.attn\.rel_pos_[hw])")

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


class Report(NamedTuple):
    """What became of each tensor, by name without `sam.`; `str` gives it in one line."""

    source: Path
    taken: list[str]
    resized: list[str]
    left_at_init: list[str]
    ignored: list[str]

    def __str__(self) -> str:
        return (
            f"{self.source}: {len(self.taken)} tensors taken, {len(self.resized)} resized to the "
            f"token grid, {len(self.left_at_init)} left at init ({parts(self.left_at_init)}), "
            f"{len(self.ignored)} of the file ignored ({parts(self.ignored)})"
        )


def parts(names: list[str]) -> str:
    """The modules that tensors belong to, each once: `mask_decoder.up4.up.bias` is in `up4`."""
    found = (name.split(".")[0 if name.startswith("backbone.") else 1] for name in names)
    return ", ".join(dict.fromkeys(found)) or "none"


# ------------------------------------------------------------------ SAM's official checkpoints


def initialize(
    model: USam, sam_model: str, sam_weight: str | Path | None, *, init: Path | None = None
) -> str:
    """Start `model` from SAM's weights; one line that says what came from where.

    init: a checkpoint of U-SAM to start from instead. sam_weight: a file, `none` for random
    weights, or None for the official file of `sam_model` in weight/. A missing official file is
    downloaded. Raises FileNotFoundError where that fails and ValueError where a file does not fit.
    """
    if init is not None:
        return start_from(model, init)
    if str(sam_weight) == "none" or (sam_weight is None and sam_model not in SAM_FILES):
        return f"{sam_model} starts from random weights"
    path = Path(sam_weight) if sam_weight else SAM_FOLDER / SAM_FILES[sam_model]
    if not path.exists():
        download_sam(path)
    return str(load_sam_checkpoint(model, path))


def start_from(model: USam, path: Path) -> str:
    """Put those weights of another U-SAM's checkpoint into `model` that fit; one line on the rest.

    Tables of positions are resized to the model's token grid; what depends on the classes stays
    at init where their number differs. Raises ValueError where nothing of the encoder fits.
    """
    state, own = read_checkpoint(path)["model"], model.state_dict()
    known = {
        n: resize(v, n.removeprefix("sam."), own[n].shape) for n, v in state.items() if n in own
    }
    fitting = {name: value for name, value in known.items() if value.shape == own[name].shape}
    if not any(name.startswith("sam.image_encoder.blocks.") for name in fitting):
        raise ValueError(f"{path}: no encoder block fits; was it trained with another --sam_model?")
    model.load_state_dict(fitting, strict=False)
    left = sorted(own.keys() - fitting.keys())
    return f"{path}: {len(fitting)} tensors taken, left at init: {', '.join(left) or 'none'}"


def load_sam_checkpoint(model: USam, path: str | Path) -> Report:
    """Put SAM's official weights into `model`, in place, checked name by name.

    The position embedding and the relative-position tables of global blocks are resized
    bilinearly to the model's token grid. Raises ValueError naming the tensors that are missing,
    unknown or of another shape.
    """
    path = Path(path)
    state = read_tensors(path)
    own = {name.removeprefix("sam."): value for name, value in model.state_dict().items()}
    wanted = [name for name in own if name.startswith(TAKEN)]
    left = [name for name in own if name not in wanted]
    ignored = [name for name in state if name not in wanted and name.startswith(IGNORED)]
    assert all(name.startswith(LEFT_AT_INIT) for name in left), left
    fitted = {name: resize(state[name], name, own[name].shape) for name in wanted if name in state}
    check_shapes(path, fitted, own)  # before the names: another encoder differs in both
    check_names(path, missing=set(wanted) - set(state), unknown=set(state) - {*wanted, *ignored})
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(fitted[name])
    resized = [name for name in wanted if state[name].shape != own[name].shape]
    taken = [name for name in wanted if name not in resized]
    return Report(path, taken, resized, left, ignored)


def resize(value: Tensor, name: str, shape: torch.Size) -> Tensor:
    """`value` for a token grid of another size; itself where it fits or cannot be resized.

    The position embedding (1, h, w, C) is resized in both directions, a relative-position table
    (2 side - 1, C) along its first axis.
    """
    if value.shape == shape or not RESIZABLE.fullmatch(name) or value.shape[-1] != shape[-1]:
        return value
    if value.dim() == 4:
        grid = F.interpolate(value.permute(0, 3, 1, 2), size=shape[1:3], mode="bilinear")
        return grid.permute(0, 2, 3, 1)
    return F.interpolate(value.T.unsqueeze(0), size=shape[0], mode="linear").squeeze(0).T


def check_shapes(source: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names the first tensor of `found` of another shape than wanted."""
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{source}: {name} is {tuple(value.shape)}, this model's is "
                f"{tuple(wanted[name].shape)}; is it the file of another --sam_model?"
            )


def check_names(source: Path, missing: set[str], unknown: set[str]) -> None:
    """Raises ValueError that names tensors which a file should hold or should not."""
    faults = {"missing": sorted(missing), "unexpected": sorted(unknown)}
    said = [
        f"{kind} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for kind, names in faults.items()
        if names
    ]
    if said:
        raise ValueError(f"{source} is not a checkpoint of this model: {'; '.join(said)}")


def download_sam(path: Path) -> None:
    """Download the official file that `path` is named after, whole and checked, to `path`.

    Raises FileNotFoundError that says where to get it if it is not official or there is no
    network, ValueError if what came is not what the digits in its name promise.
    """
    where = f"download it from {SAM_URL}{path.name} and put it there, or pass --sam_weight none"
    if path.name not in SAM_FILES.values():
        official = ", ".join(SAM_FILES.values())
        raise FileNotFoundError(f"no SAM checkpoint at {path}; official files are {official}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = fetch(SAM_URL + path.name, temporary)
        promised = path.stem.rpartition("_")[2]
        if not found.startswith(promised):
            raise ValueError(f"{path.name} came damaged: MD5 {found}, not {promised}...; {where}")
        os.replace(temporary, path)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"no SAM checkpoint at {path} ({error}); {where}") from error
    finally:
        temporary.unlink(missing_ok=True)


def fetch(url: str, path: Path) -> str:
    """Write what `url` serves to `path`, with a progress bar; its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0) or None
        name = url.rpartition("/")[2]
        with tqdm(total=size, unit="B", unit_scale=True, desc=name) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


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
        raise ValueError(f"{source}: its part 'model' is not tensors by name")
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
    names = [name for name, size in SAM_MODELS.items() if size.width == width]
    if not names:
        raise ValueError(f"{source}: no SAM encoder is {width} channels wide")
    return names[0], len(state[output]), side * PATCH
