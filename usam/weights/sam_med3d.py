"""Loads published SAM-Med3D checkpoints, with every name and shape checked.

u-sam.py reads a file here first, for the layout it holds, then loads it into the built network.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import Tensor

from usam.models.sam_med3d import SamMed3d, build_sam_med3d
from usam.runtime.processes import say
from usam.weights.foreign import describe, encoder_name
from usam.weights.state_dict import load_model_state
from usam.weights.tensor_files import read_tensors

ADDRESS = "huggingface.co/blueyo0/SAM-Med3D"
PUBLISHED = Path("weight/sam_med3d_turbo.pth")
POINT_EMBEDDING = "prompt_encoder.point_embeddings."


def load_or_initialize(args: Namespace, saved: dict[str, Any] | None) -> SamMed3d:
    """The network with the weights of --resume, else of --sam_weight; says which."""
    if saved:
        state, num_points = saved["model"], saved["data"]["num_point_embeddings"]
        source = args.resume
    else:
        source, state, num_points = starting_weights(args.sam_model, args.sam_weight)
    model = build_sam_med3d(args.sam_model, args.rel_pos, num_points)
    if state is not None:
        load_model_state(model, state, source)
    elif args.eval or args.predict or args.serve or args.annotate:
        raise ValueError("this run needs trained weights: pass --resume or --sam_weight")
    size = f"SAM-Med3D {args.sam_model}, {model.side} voxels a side, {args.rel_pos} positions"
    say(f"{size}: {source or 'random weights'}")
    return model


def starting_weights(
    sam_model: str, sam_weight: str | Path | None
) -> tuple[Path | None, dict[str, Tensor] | None, int]:
    """The file that --sam_weight names, its tensors, and their number of point embeddings.

    sam_weight: a file, `none` for random weights (None, None, 2), or None for the published file
    in weight/, of the one size it has. Raises what load_sam_med3d_checkpoint raises.
    """
    if str(sam_weight) == "none" or (sam_weight is None and sam_model != "vit_b_ori"):
        return None, None, 2
    path = Path(sam_weight or PUBLISHED)
    state, facts = load_sam_med3d_checkpoint(path)
    return path, state, facts["num_point_embeddings"]


def load_sam_med3d_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict on the CPU, and the facts a network that fits it is built from.

    Reads the published wrapper, a bare state dict, and either with `module.` before each name.
    Facts: num_point_embeddings (2 or 4) and num_tensors. Nothing is unpickled but tensors, plain
    values and the wrapper's argparse.Namespace.
    Raises FileNotFoundError for a missing file and ValueError for one that is no SAM-Med3D.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such SAM-Med3D checkpoint; download sam_med3d_turbo.pth from {ADDRESS} "
            "and put it there, or train from random weights: --sam_weight none"
        )
    state = read_tensors(path)
    if encoder_name(state) != "sam-med3d":
        raise ValueError(
            f"{path} holds {describe(state)}; --model sam-med3d needs SAM-Med3D weights, "
            f"published at {ADDRESS}"
        )
    num_point_embeddings = len({name for name in state if name.startswith(POINT_EMBEDDING)})
    if num_point_embeddings not in (2, 4):
        raise ValueError(
            f"{path}: wanted SAM-Med3D's 2 or 4 point embeddings, found {num_point_embeddings} "
            f"among {len(state)} tensors; published checkpoints are at {ADDRESS}"
        )
    return state, {"num_point_embeddings": num_point_embeddings, "num_tensors": len(state)}
