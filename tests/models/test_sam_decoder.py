"""Without the U-shaped adapter the model is SAM: its numbers, its names, its weights.

The package `segment_anything` is what it is compared with, at a size that tests can afford.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from segment_anything import build_sam_vit_b
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn

from tests.models.test_model import BOXES, MODES, POINTS
from usam.models.sam_encoder import SAM_SIZES
from usam.models.usam import USam, build_usam
from usam.weights import sam as sam_file

SIDE = 64


def sam_of(size: str) -> Sam:
    """SAM of the size `vit_tiny`, by the package's own classes, all of its weights random."""
    tiny, grid = SAM_SIZES[size], SIDE // 16
    encoder = ImageEncoderViT(
        img_size=SIDE, embed_dim=tiny.width, depth=tiny.depth, num_heads=tiny.num_heads,
        out_chans=256, qkv_bias=True, use_rel_pos=True, window_size=14,
        global_attn_indexes=tiny.global_blocks, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    prompts = PromptEncoder(256, (grid, grid), (SIDE, SIDE), mask_in_chans=16)
    decoder = MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048))
    sam = Sam(encoder, prompts, decoder).eval()
    with torch.no_grad():
        for parameter in sam.parameters():  # SAM's own start leaves its positions at 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(3)
    return sam_of("vit_tiny")


@pytest.fixture(scope="module")
def weights_of_sam(sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(sam.state_dict(), path)
    return path


def without_u(num_classes: int = 4, weights: Path | None = None) -> USam:
    model = build_usam("vit_tiny", num_classes, SIDE, adapter="none").eval()
    if weights:
        sam_file.load_sam_checkpoint(model, weights)
    return model


@pytest.mark.parametrize("mode", range(4))
@torch.inference_mode()
def test_logits_are_sams_masks_of_all_tokens_at_full_size(
    sam: Sam, weights_of_sam: Path, mode: int
) -> None:
    model, image = without_u(4, weights_of_sam), torch.rand(2, 1, SIDE, SIDE)
    embedding = sam.image_encoder(model.normalise(image))
    given = MODES[mode]
    for number in range(2):  # SAM takes one image at a time
        points, boxes = given.get("points"), given.get("boxes")
        points = points and (points[0][number : number + 1], points[1][number : number + 1])
        boxes = None if boxes is None else boxes[number : number + 1]
        sparse, dense = sam.prompt_encoder(points, boxes, masks=None)
        masks, _ = sam.mask_decoder.predict_masks(
            embedding[number : number + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense
        )
        wanted = F.interpolate(masks, (SIDE, SIDE), mode="bilinear", align_corners=False)
        found = model(image, **given)[number : number + 1]
        assert (found - wanted).abs().max() <= 1e-4 * wanted.std()


def test_mask_tokens_and_their_networks_serve_the_first_classes(
    sam: Sam, weights_of_sam: Path
) -> None:
    tokens = sam.mask_decoder.mask_tokens.weight
    few, many = without_u(3), without_u(6)
    start = many.sam.mask_decoder.mask_tokens.weight.clone()
    reports = [sam_file.load_sam_checkpoint(model, weights_of_sam) for model in (few, many)]
    assert torch.equal(few.sam.mask_decoder.mask_tokens.weight, tokens[:3])
    assert torch.equal(many.sam.mask_decoder.mask_tokens.weight, torch.cat([tokens, start[4:]]))
    assert all("mask_decoder.mask_tokens.weight" in report.resized for report in reports)
    assert reports[0].left_at_init == []
    assert "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight" in reports[0].ignored
    left = {name.rpartition(".layers")[0] for name in reports[1].left_at_init}
    assert left == {f"mask_decoder.output_hypernetworks_mlps.{index}" for index in (4, 5)}
    assert "new: output_hypernetworks_mlps;" in str(reports[1])


@pytest.mark.parametrize("tuning", ["full", "lora", "decoder"])
def test_every_official_tensor_is_taken_or_known_to_be_unused(tmp_path: Path, tuning: str) -> None:
    with torch.device("meta"):
        official = {name: v.shape for name, v in build_sam_vit_b().state_dict().items()}
        model = build_usam("vit_b", 4, 224, "none", tuning)
    state = {name: torch.zeros(()).expand(shape) for name, shape in official.items()}
    torch.save(state, tmp_path / "sam_vit_b.pth")
    report = sam_file.load_sam_checkpoint(model.to_empty(device="cpu"), tmp_path / "sam_vit_b.pth")
    unused = {name for name in official if name.startswith(sam_file.UNUSED_OF_SAM)}
    assert set(report.ignored) == unused
    assert set(report.taken) | set(report.resized) == official.keys() - unused
    assert "image_encoder.patch_embed.proj.weight" in report.taken
    assert "mask_decoder.output_upscaling.3.weight" in report.taken
    assert len(report.resized) == 9
    lora = 4 * 12 if tuning == "lora" else 0
    assert len(report.left_at_init) == lora


def test_there_is_no_down_path_and_no_other_output_size() -> None:
    model = without_u(17)
    assert not [name for name in model.state_dict() if name.startswith("backbone.")]
    assert model(torch.rand(1, 3, SIDE, SIDE), points=(POINTS[0][:1], POINTS[1][:1])).shape == (
        1, 17, SIDE, SIDE,
    )  # fmt: skip
    assert [group["name"] for group in model.parameter_groups(1, 1, 1)] == ["decoder", "encoder"]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(2, 1, SIDE, SIDE), boxes=BOXES).dtype == torch.float32
