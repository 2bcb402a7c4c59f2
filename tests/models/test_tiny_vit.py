"""SAM with TinyViT: the embedding's size, LoRA by head, frozen statistics, both decoders."""

from __future__ import annotations

import pytest
import torch

from usam.models.lora import is_lora, merged, to_samed
from usam.models.tiny_vit import TinyVit, WindowAttention
from usam.models.usam import USam, build_usam

SIDE, BOXES = 64, torch.tensor([[2.0, 3.0, 40.0, 50.0]])


def image() -> torch.Tensor:
    return torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def with_lora(adapter: str, stride: int) -> USam:
    model = build_usam("vit_t", 3, SIDE, adapter, "lora", stride).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_lora(name):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("stride", [4, 16])
def test_an_embedding_is_a_quarter_or_a_sixteenth_of_the_image(stride: int) -> None:
    embedding = TinyVit(stride)(torch.rand(1, 3, SIDE, SIDE))
    assert embedding.shape == (1, 256, SIDE // stride, SIDE // stride)


@pytest.mark.parametrize("adapter", ["u", "none"])
@pytest.mark.parametrize("stride", [4, 16])
def test_logits_have_the_images_size_and_lora_merges_exactly(adapter: str, stride: int) -> None:
    model = with_lora(adapter, stride)
    plain = build_usam("vit_t", 3, SIDE, adapter, stride=stride).eval()
    plain.load_state_dict(merged(model.state_dict()))
    with torch.no_grad():
        logits = model(image(), boxes=BOXES)
        torch.testing.assert_close(plain(image(), boxes=BOXES), logits, rtol=0, atol=1e-4)
    assert logits.shape == (1, 3, SIDE, SIDE)
    assert len(list(filter(is_lora, model.state_dict()))) == 4 * 10  # ten blocks have attention


def test_lora_moves_queries_and_values_and_leaves_keys() -> None:
    model = with_lora("none", 4)
    weights, name = model.state_dict(), "sam.image_encoder.layers.1.blocks.0.attn.qkv.weight"
    moved = (merged(weights)[name] - weights[name]).unflatten(0, (4, 3, 32)).abs().amax(dim=(2, 3))
    assert (moved[:, 0] > 0).all()
    assert (moved[:, 1] == 0).all()
    assert (moved[:, 2] > 0).all()


def test_biases_depend_on_the_distance_of_two_tokens() -> None:
    attention = WindowAttention(64, window=3)
    assert attention.apart[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert attention.apart[4].tolist() == [4, 3, 4, 1, 0, 1, 4, 3, 4]  # from the middle token


@pytest.mark.parametrize("tuning", ["full", "lora", "decoder"])
def test_a_frozen_encoder_keeps_its_statistics(tuning: str) -> None:
    model = build_usam("vit_t", 3, SIDE, "none", tuning, 4).train()
    norm = model.sam.image_encoder.patch_embed.seq[0].bn
    before = norm.running_mean.clone()
    model(image())
    assert torch.equal(norm.running_mean, before) == (tuning != "full")


@pytest.mark.parametrize("adapter", ["u", "none"])
def test_a_known_embedding_gives_the_same_logits(adapter: str) -> None:
    model = build_usam("vit_t", 3, SIDE, adapter, "decoder", 4).eval()
    with torch.no_grad():
        known = model(image(), embedding=model.embed(image()))
        assert torch.equal(known, model(image()))


def test_gradients_reach_every_trained_parameter() -> None:
    for adapter, stride in (("u", 4), ("u", 16), ("none", 4)):
        model = build_usam("vit_t", 3, SIDE, adapter, stride=stride)
        model(image(), boxes=BOXES).sum().backward()
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unused == ["sam.mask_decoder.iou_token.weight"] or not unused, (adapter, unused)


def test_other_choices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="stride must be one of"):
        build_usam("vit_t", 3, SIDE, stride=8)
    with pytest.raises(ValueError, match="multiple of 16"):
        build_usam("vit_t", 3, 100)
    with pytest.raises(ValueError, match="not for vit_t"):
        to_samed(with_lora("none", 4).state_dict())
