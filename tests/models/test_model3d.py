"""SAM-Med3D's registry, prompts and click rounds, on a network small enough to train here.

The recorded numbers of the real network are in test_model3d_published.py.
"""

from __future__ import annotations

import pytest
import torch

from usam.models import sam_med3d as model3d
from usam.models.sam_med3d import build_sam_med3d, rounds_without_click

A, B = [40, 7, 9], [10, 20, 61]


def clicks(*coords: list[int], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([coords], dtype=torch.float32), torch.tensor([labels])


@pytest.mark.parametrize(
    ("name", "dim", "depth", "num_heads", "side", "global_blocks"),
    [
        ("vit_b_ori", 768, 12, 12, 128, (2, 5, 8, 11)),
        ("vit_b", 384, 12, 12, 256, (2, 5, 8, 11)),
        ("vit_l", 1024, 24, 16, 256, (5, 11, 17, 23)),
        ("vit_h", 1280, 32, 16, 256, (7, 15, 23, 31)),
        ("vit_tiny", 96, 4, 3, 64, (1, 3)),
    ],
)
def test_registry_sizes(name, dim, depth, num_heads, side, global_blocks) -> None:
    with torch.device("meta"):
        model = build_sam_med3d(name)
    encoder, grid = model.image_encoder, side // 16
    assert encoder.pos_embed.shape == (1, grid, grid, grid, dim)
    assert [block.attn.num_heads for block in encoder.blocks] == depth * [num_heads]
    windows = [grid if index in global_blocks else 14 for index in range(depth)]
    assert [block.attn.window for block in encoder.blocks] == windows
    assert model.side == side


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match="vit_b_ori.*found 'vit_x'"):
        build_sam_med3d("vit_x")
    with pytest.raises(ValueError, match="published, corrected, found 'right'"):
        build_sam_med3d("vit_tiny", rel_pos="right")
    with pytest.raises(ValueError, match="2 or 4, found 3"):
        build_sam_med3d("vit_tiny", num_point_embeddings=3)


@pytest.fixture
def tiny() -> model3d.SamMed3d:
    return build_sam_med3d("vit_tiny")


def ball(*centres: tuple[int, int, int]) -> torch.Tensor:
    """(N, 64, 64, 64) uint8 masks of balls with radius 10 voxels."""
    grid = torch.stack(torch.meshgrid(*3 * [torch.arange(64)], indexing="ij"), dim=-1)
    return torch.stack([((grid - torch.tensor(c)) ** 2).sum(-1) <= 100 for c in centres]).byte()


def test_clicks_are_encoded_in_array_order_and_the_grid_swapped(tiny) -> None:
    encoding = tiny.prompt_encoder.pe_layer
    grid = encoding.grid(4)[0]
    torch.testing.assert_close(grid[:, 1, 3, 2], encoding((torch.tensor([3, 1, 2]) + 0.5) / 4))


@torch.no_grad()
def test_one_embedding_serves_several_prompts(tiny) -> None:
    embedding, masks = torch.randn(1, 384, 4, 4, 4), torch.randn(2, 1, 16, 16, 16)
    coords, labels = 63 * torch.rand(2, 3, 3), torch.tensor([[1, 0, 1], [0, 1, 1]])
    both = tiny.decode(embedding, (coords, labels), masks)
    assert both.shape == (2, 1, 16, 16, 16)
    for index in range(2):
        here = slice(index, index + 1)
        one = tiny.decode(embedding, (coords[here], labels[here]), masks[here])
        torch.testing.assert_close(both[here], one, rtol=1e-4, atol=1e-5)
    several = tiny.decode(embedding, (coords, labels))
    assert several.shape == (2, 1, 16, 16, 16)


def test_boxes_need_four_point_embeddings(tiny) -> None:
    box = torch.tensor([[[4.0, 5, 6], [40, 41, 42]]])
    with pytest.raises(ValueError, match="4 point embeddings"):
        tiny.decode(torch.zeros(1, 384, 4, 4, 4), boxes=box)
    model = build_sam_med3d("vit_tiny", num_point_embeddings=4)
    prompts = model.prompt_encoder
    tokens = prompts.sparse(None, box)
    assert tokens.shape == (1, 2, 384)
    corner = prompts.pe_layer((box[0, 1] + 0.5) / 64) + prompts.point_embeddings[3].weight[0]
    torch.testing.assert_close(tokens[0, 1], corner)
    # A box takes the place of the padding token.
    assert prompts.sparse(clicks(A, labels=[1]), box).shape == (1, 3, 384)
    assert model.decode(torch.zeros(1, 384, 4, 4, 4), boxes=box).shape == (1, 1, 16, 16, 16)


def test_ignored_points_equal_the_padding_token(tiny) -> None:
    tokens = tiny.prompt_encoder.sparse(clicks(A, B, labels=[-1, 1]), None)
    assert torch.equal(tokens[0, 0], tokens[0, 2])
    assert not torch.equal(tokens[0, 1], tokens[0, 2])


@pytest.mark.parametrize("num_point_embeddings", [2, 4])
def test_every_trainable_parameter_gets_a_gradient(num_point_embeddings: int) -> None:
    model = build_sam_med3d("vit_tiny", num_point_embeddings=num_point_embeddings)
    mask = ball((20, 30, 40))
    generator = torch.Generator().manual_seed(1)
    # One round with a click, one without: the shortest training there is.
    logits = model(torch.randn(1, 1, 64, 64, 64), mask, generator, num_rounds=2)
    assert logits.shape == (1, 2, 16, 16, 16)
    logits.square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad}
    unused = ("iou_prediction_head", "mlps.1", "mlps.2", "mlps.3", "no_mask_embed")
    corners = ("point_embeddings.2", "point_embeddings.3")
    assert all(any(part in name for part in unused + corners) for name in without)
    assert len(without) == 25 + num_point_embeddings - 2
    still = {name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()}
    # The only click is positive, so the other embedding waits with zeros, in DDP's sight.
    assert still <= {"prompt_encoder.point_embeddings.0.weight"}


def test_gradients_reach_a_mask_through_the_next_round(tiny) -> None:
    mask, volume = ball((20, 30, 40)), torch.randn(1, 1, 64, 64, 64)
    logits = tiny(volume, mask, torch.Generator().manual_seed(1), num_rounds=3)
    weight = tiny.prompt_encoder.not_a_point_embed.weight
    # The last round has no click of its own; the token acts on it through the mask alone.
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), weight)
    assert gradient.any()


def test_rounds_depend_on_the_generator_only(tiny) -> None:
    mask, volume = ball((20, 30, 40), (50, 12, 33)), torch.randn(2, 1, 64, 64, 64)
    with torch.no_grad():
        first, again, other = (
            tiny(volume, mask, torch.Generator().manual_seed(seed), num_rounds=4)
            for seed in (3, 3, 4)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clicks_accumulate_and_two_rounds_have_none(tiny, monkeypatch) -> None:
    seen, decode = [], tiny.decode

    def record(embedding, points, mask):
        logits = decode(embedding, points, mask)
        seen.append((points, mask, logits))
        return logits

    monkeypatch.setattr(tiny, "decode", record)
    mask = ball((20, 30, 40), (50, 12, 33))
    with torch.no_grad():
        answers = tiny(torch.randn(2, 1, 64, 64, 64), mask, torch.Generator().manual_seed(3))
    assert answers.shape == (2, 11, 16, 16, 16)
    numbers = [0 if points is None else points[1].shape[1] for points, _, _ in seen]
    quiet = numbers.index(0)
    assert 2 <= quiet <= 8
    assert numbers[-1] == 0
    assert [n for n in numbers if n] == list(range(1, 10))
    assert not seen[0][1].any()  # the first mask prompt is all zeros
    for before, after in zip(seen, seen[1:], strict=False):
        assert after[1] is before[2]
    last = seen[9][0] or seen[8][0]
    for sample, (coords, labels) in enumerate(zip(*last, strict=True)):
        i, j, k = coords.long().unbind(-1)
        assert torch.equal(mask[sample, i, j, k].long(), labels.long())
    first_click = seen[0][0][0]
    assert torch.equal(last[0][:, :1], first_click)


def test_the_round_without_a_click_is_drawn_from_2_to_8() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [rounds_without_click(11, generator) for _ in range(300)]
    assert all(10 in quiet for quiet in drawn)
    assert set().union(*drawn) == {2, 3, 4, 5, 6, 7, 8, 10}
    assert rounds_without_click(4, generator) == {2, 3}
    assert rounds_without_click(2, generator) == {1}
    assert rounds_without_click(1, generator) == set()


def test_click_rounds_run_under_autocast(tiny) -> None:
    mask, volume = ball((20, 30, 40)), torch.randn(1, 1, 64, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tiny(volume, mask, torch.Generator().manual_seed(1), num_rounds=3)
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert tiny.image_encoder.pos_embed.grad.isfinite().all()


def test_parameter_groups_hold_every_trainable_parameter_once(tiny) -> None:
    groups = tiny.parameter_groups(8e-4)
    assert [group["lr"] for group in groups] == pytest.approx([8e-4, 8e-5, 8e-5])
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in tiny.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(trained)
