"""LoRA files in the format of SAMed: `w_a_000` and so on, with or without a decoder.

Training starts from one (`--lora_weight`), and `--export_lora` writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dataset.files import atomic_write
from usam.models.lora import RANK, from_samed, is_lora, rank_of, to_samed
from usam.models.usam import USam
from usam.weights.foreign import describe
from usam.weights.state_dict import check_names, check_tensors
from usam.weights.tensor_files import read_tensors

TUNED = ("prompt_encoder.", "mask_decoder.")  # SAMed's files hold these beside LoRA


def load_lora(model: USam, path: Path) -> str:
    """Load a LoRA file into `model`, in place; returns one line on what was loaded.

    Every LoRA tensor must be there and fit. Of SAM's prompt encoder and decoder, in SAMed's own
    files, what fits is taken where `model` has them (--adapter none). Raises FileNotFoundError or
    ValueError.
    """
    tensors = read_tensors(path)
    state = model.state_dict()
    found, own = from_samed(tensors, "sam.image_encoder."), set(filter(is_lora, state))
    if not own:
        raise ValueError("--lora_weight needs --tuning lora")
    if not found:
        raise ValueError(f"{path} holds {describe(tensors)}; --lora_weight needs a LoRA file")
    if (rank := rank_of(found)) != RANK:
        raise ValueError(f"{path}: LoRA of rank {rank}, wanted {RANK}")
    check_tensors(path, {name: found[name] for name in own & found.keys()}, state)
    check_names(path, missing=own - found.keys(), unknown=found.keys() - own)
    rest = {f"sam.{name}": value for name, value in tensors.items() if name.startswith(TUNED)}
    fits = {
        name: value
        for name, value in rest.items()
        if model.adapter == "none" and name in state and state[name].shape == value.shape
    }
    check_tensors(path, fits, state)
    model.load_state_dict(found | fits, strict=False)
    return (
        f"{path}: LoRA of {len(found) // 4} blocks loaded, {len(fits)} tensors of prompts and "
        f"decoder, {len(tensors) - len(found) - len(fits)} not used"
    )


def save_lora(state: Mapping[str, Tensor], path: Path, *, with_decoder: bool) -> str:
    """Write the LoRA of a model's weights under SAMed's names; returns one line about it.

    A path that ends in .safetensors becomes that, any other a torch file. with_decoder: also
    prompts and mask decoder, which are SAM's without the U-shaped adapter. SAMed's program wants
    two modules more, which U-SAM does not have: mask_downscaling and iou_prediction_head.
    Missing folders are made. Raises ValueError where there is no LoRA, OSError naming the path
    where it cannot be written.
    """
    tensors = to_samed(state)
    if with_decoder:
        plain = {name.removeprefix("sam."): value for name, value in state.items()}
        tensors |= {n: v.contiguous() for n, v in plain.items() if n.startswith(TUNED)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            if path.suffix == ".safetensors":
                save_file(tensors, temporary)
            else:
                torch.save(tensors, temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}") from error
    return f"{len(tensors)} tensors in {path}, named as SAMed names them"
