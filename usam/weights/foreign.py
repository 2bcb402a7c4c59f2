"""Weight files of other programs, recognised by the names and shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from usam.models.lora import from_samed, rank_of
from usam.models.sam_encoder import SAM_SIZES

PATCHES = "image_encoder.patch_embed.proj.weight"
TINY_VIT_PATCHES = "image_encoder.patch_embed.seq.0.c.weight"
LORA_A = re.compile(r"w_a_\d{3}")
# Of other programs' files what no model here uses: SAM-HQ's second mask decoder, and the
# ImageNet classifier in MobileSAM's file.
EXTRAS = (
    "mask_decoder.hf_", "mask_decoder.compress_vit_feat.", "mask_decoder.embedding_encoder.",
    "mask_decoder.embedding_maskfeature.", "image_encoder.norm_head.", "image_encoder.head.",
)  # fmt: skip
# Hugging Face's names for SAM, and SAM's own, applied in this order.
HUGGING_FACE = (
    (r"^shared_image_embedding\.", "prompt_encoder.shared_embedding."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^image_encoder\.layers\.", "image_encoder.blocks."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."),
    (r"\.neck\.layer_norm2\.", ".neck.3."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
    (r"\.point_embed\.", ".point_embeddings."),
    (
        r"\.shared_embedding\.positional_embedding$",
        ".pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"\.layers\.0\.(weight|bias)$", r".layers.1.\1"),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)


def describe(state: Mapping[str, Tensor]) -> str:
    """The kind of weights as text: "SAM vit_b weights", "LiteMedSAM weights (vit_t)", ...

    Names not seen before are described by their number and the first of them.
    """
    if any(name.startswith(("sam.", "backbone.")) for name in state):
        return "weights of U-SAM, which --resume and --init read"
    if any(LORA_A.fullmatch(name) for name in state):
        return f"LoRA of rank {rank_of(from_samed(state, ''))}, which --lora_weight reads"
    if any(name.startswith(("image_encoder.trunk.", "memory_attention.")) for name in state):
        return "SAM 2 weights, which are not supported"
    if any(".Adapter." in name for name in state):
        return "SAM-Med2D weights, which are not supported (their encoder has adapter layers)"
    size = encoder_name(state)
    if size is None:
        return f"{len(state)} tensors of an unknown model ({min(state)}, ...)"
    if size == "vit_t":
        return f"{'MobileSAM' if stride_of(state) == 16 else 'LiteMedSAM'} weights (vit_t)"
    if size == "sam-med3d":
        return "SAM-Med3D weights (--model sam-med3d)"
    name = "SAM-HQ" if any(n.startswith("mask_decoder.hf_") for n in state) else "SAM"
    return f"{name} {size} weights"


def encoder_name(state: Mapping[str, Tensor]) -> str | None:
    """The --sam_model that weights with SAM's names belong to, `sam-med3d`, or None."""
    if TINY_VIT_PATCHES in state and state[TINY_VIT_PATCHES].dim() == 4:
        return "vit_t"
    patches = state.get(PATCHES)
    if patches is None or patches.dim() not in (4, 5):
        return None
    if patches.dim() == 5:
        return "sam-med3d"
    return next((name for name, size in SAM_SIZES.items() if size.width == len(patches)), None)


def stride_of(state: Mapping[str, Tensor]) -> int | None:
    """The stride of vit_t that weights with SAM's names belong to; None for another encoder."""
    if encoder_name(state) != "vit_t":
        return None
    return 4 if state[TINY_VIT_PATCHES].shape[-1] == 1 else 16


def to_sam_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under SAM's own names: Hugging Face's are translated, others stay as they are."""
    if not any(name.startswith("vision_encoder.") for name in state):
        return dict(state)
    return {_sam_name(name): value for name, value in state.items()}


def _sam_name(name: str) -> str:
    mlp = "mlps." in name or "iou_prediction_head." in name
    for pattern, replacement in HUGGING_FACE:
        if r"\.layers\.0" in pattern and not mlp:
            continue  # only in the MLPs the first hidden layer is called `layers.0`
        name = re.sub(pattern, replacement, name)
    return name
