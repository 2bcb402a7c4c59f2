"""SAM as published, with all of its masks: read from a file to segment scans without training."""

from __future__ import annotations

from pathlib import Path

from usam.models.sam import Sam, build_sam
from usam.models.sam_encoder import PATCH
from usam.weights.foreign import EXTRAS, describe, stride_of
from usam.weights.sam import SCALES, find, read_sam
from usam.weights.state_dict import load_model_state

VIT_T_SIDES = {4: 256, 16: 1024}  # pixels, by stride: LiteMedSAM, MobileSAM
VIT_T_PREPARATIONS = {4: "minmax", 16: "sam"}


def load_pretrained(
    sam_model: str, sam_weight: str | None, preparation: str | None = None
) -> tuple[Sam, dict[str, str]]:
    """A SAM for prediction with its published weights, and facts: checkpoint, weights, input.

    preparation: of PREPARATIONS, where it is not the file's own. MedSAM's ViT-B file has SAM's
    names and shapes, so it is known by "medsam" in its name. Raises FileNotFoundError where there
    is no file, ValueError where it does not fit.
    """
    path = find(sam_model, sam_weight)
    if path is None:
        raise ValueError(
            "--predict without --resume needs trained weights: pass --sam_weight FILE, or "
            "--sam_model vit_t for LiteMedSAM's"
        )
    state = {n: v for n, v in read_sam(path, sam_model).items() if not n.startswith(EXTRAS)}
    stride = stride_of(state) or PATCH
    own = VIT_T_PREPARATIONS[stride] if sam_model == "vit_t" else scale_of(path)
    model = build_sam(
        sam_model, side_of(sam_model, state), stride=stride, preparation=preparation or own
    )
    load_model_state(model, state, path)
    facts = {
        "checkpoint": str(path),
        "weights": describe(state),
        "input": f"{model.img_size} pixels on {SCALES[model.preparation.name]}",
    }
    return model, facts


def scale_of(path: Path) -> str:
    """The scale that a SAM file's weights were trained with, by its name."""
    return "minmax" if "medsam" in path.name.lower() else "sam"


def side_of(sam_model: str, state: dict) -> int:
    """The side of the image that weights were trained with, pixels."""
    if sam_model == "vit_t":
        return VIT_T_SIDES[stride_of(state)]
    position = state.get("image_encoder.pos_embed")
    return 1024 if position is None or position.dim() != 4 else position.shape[1] * PATCH
