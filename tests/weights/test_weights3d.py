"""Checkpoints as published: wrapper, bare and parallel names are read, faults are named.

The network is vit_tiny, whose names are those of the published one less the deeper blocks.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import pytest
import torch

from usam.models.sam_med3d import build_sam_med3d
from usam.weights.export import export
from usam.weights.sam_med3d import load_sam_med3d_checkpoint
from usam.weights.state_dict import load_model_state


class Unsafe:
    """Something no weights file should hold."""


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return build_sam_med3d("vit_tiny").state_dict()


def published_wrapper(state: dict[str, torch.Tensor]) -> dict:
    return {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "lr_scheduler_state_dict": {"milestones": Counter({120: 1, 180: 1}), "gamma": 0.1},
        "losses": [1.0],
        "dices": [0.5],
        "best_loss": float("inf"),
        "best_dice": 0.5,
        "args": argparse.Namespace(lr=8e-4, device=torch.device("cpu"), click_type="random"),
        "used_datas": ["somewhere"],
    }


def wrappers(state: dict[str, torch.Tensor]) -> dict[str, dict]:
    parallel = {f"module.{name}": value for name, value in state.items()}
    return {
        "wrapper": published_wrapper(state),
        "bare": state,
        "parallel": parallel,
        "parallel_wrapper": published_wrapper(parallel),
    }


def test_published_wrapper_has_the_recorded_keys(recorded: Path, state: dict) -> None:
    rows = (
        (recorded / "sam_med3d_checkpoint_wrapper.tsv").read_text(encoding="utf-8").splitlines()[1:]
    )
    assert [row.split("\t")[0] for row in rows] == list(published_wrapper(state))


@pytest.mark.parametrize("layout", ["wrapper", "bare", "parallel", "parallel_wrapper"])
def test_every_layout_gives_the_same_weights(tmp_path: Path, state: dict, layout: str) -> None:
    torch.save(wrappers(state)[layout], tmp_path / "weights.pth")
    read, facts = load_sam_med3d_checkpoint(tmp_path / "weights.pth")
    assert facts == {"num_point_embeddings": 2, "num_tensors": len(state)}
    model = build_sam_med3d("vit_tiny")
    load_model_state(model, read, "weights.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_checkpoint_is_exported_in_the_published_form(
    tmp_path: Path, state: dict, capsys
) -> None:
    saved = {"model": state, "args": {"rel_pos": "published"}, "data": {"num_point_embeddings": 2}}
    ours, target = tmp_path / "best.pth", tmp_path / "new" / "sam_med3d.pth"
    torch.save(saved, ours)
    args = argparse.Namespace(
        resume=ours, export_lora=None, export_weights=target, overwrite=False, adapter=None
    )
    export(args, saved)
    assert f"{len(state)} tensors in {target}" in capsys.readouterr().out
    assert list(torch.load(target, weights_only=True)) == ["model_state_dict"]
    read, _ = load_sam_med3d_checkpoint(target)
    build_sam_med3d("vit_tiny").load_state_dict(read, strict=True)
    assert all(torch.equal(read[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match="sam_med3d.pth exists; choose another name or"):
        export(args, saved)
    args.overwrite, args.export_weights = True, ours
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export(args, saved)
    saved["args"]["rel_pos"], args.export_weights = "corrected", tmp_path / "other.pth"
    with pytest.raises(ValueError, match="trained with --rel_pos corrected"):
        export(args, saved)
    assert not args.export_weights.exists()


def test_four_point_embeddings_are_recognised(tmp_path: Path) -> None:
    model = build_sam_med3d("vit_tiny", num_point_embeddings=4)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "weights.pth")
    read, facts = load_sam_med3d_checkpoint(tmp_path / "weights.pth")
    assert facts["num_point_embeddings"] == 4
    model = build_sam_med3d("vit_tiny", num_point_embeddings=4)
    load_model_state(model, read, "weights.pth")


def test_missing_file_gives_the_address(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="huggingface.co/blueyo0/SAM-Med3D"):
        load_sam_med3d_checkpoint(tmp_path / "sam_med3d_turbo.pth")


def test_missing_unexpected_and_wrong_shapes_are_named(state: dict) -> None:
    model = build_sam_med3d("vit_tiny")
    before = model.prompt_encoder.no_mask_embed.weight.clone()
    wrong = {**state, "decoder.extra": torch.zeros(1)}
    wrong["prompt_encoder.no_mask_embed.weight"] = before + 1
    del wrong["mask_decoder.iou_token.weight"]
    named = "a.pth .*: missing mask_decoder.iou_token.weight; unexpected decoder.extra"
    with pytest.raises(ValueError, match=named):
        load_model_state(model, wrong, "a.pth")
    wrong["image_encoder.pos_embed"] = torch.zeros(1, 8, 8, 8, 96)
    shapes = (
        r"a.pth: image_encoder.pos_embed has shape \(1, 8, 8, 8, 96\).* needs \(1, 4, 4, 4, 96\)"
    )
    with pytest.raises(ValueError, match=shapes):
        load_model_state(model, wrong, "a.pth")
    assert torch.equal(model.prompt_encoder.no_mask_embed.weight, before)  # nothing was copied


def test_other_files_are_refused_in_one_line(tmp_path: Path, state: dict) -> None:
    contents = {
        "text": b"not a checkpoint",
        "empty": b"",
        "other_network": {"weight": torch.zeros(2)},
        "list": [torch.zeros(2)],
        "values": {"epoch": 3},
        "code": {**published_wrapper(state), "args": Unsafe()},
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=f"{name}.pth") as error:
            load_sam_med3d_checkpoint(path)
        assert "\n" not in str(error.value)
