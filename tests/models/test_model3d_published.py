"""SAM-Med3D at its real size gives the published network's recorded numbers, and medim's.

The network is filled and its encoder run once; every tensor is checked within its tolerance.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.fill import fill_state_dict, image
from usam.models.sam_med3d import build_sam_med3d

A, B = [40, 70, 90], [100, 20, 61]


def close(found: torch.Tensor, wanted: np.ndarray, tolerance: float) -> None:
    """Fail unless all values agree within an absolute tolerance."""
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.detach().numpy() - wanted).max() <= tolerance


def clicks(*coords: list[int], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([coords], dtype=torch.float32), torch.tensor([labels])


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        names = build_sam_med3d().state_dict()
    return fill_state_dict(names)


@pytest.fixture(scope="module")
def published(weights: dict[str, torch.Tensor]) -> SimpleNamespace:
    """The network at its real size, its embedding of one volume and tokens on the way."""
    with torch.device("meta"):
        model = build_sam_med3d()
    model.load_state_dict(weights, strict=True, assign=True)
    volume = torch.from_numpy(2 * image(5, (1, 1, 128, 128, 128)) - 1)
    return run_encoder(model.eval(), volume)


def run_encoder(model: torch.nn.Module, volume: torch.Tensor) -> SimpleNamespace:
    encoder, taken = model.image_encoder, {}
    parts = {"patch": encoder.patch_embed}
    parts |= {f"block{index}": encoder.blocks[index] for index in range(3)}
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: taken.update({name: out}))
        for name, part in parts.items()
    ]
    with torch.no_grad():
        embedding = encoder(volume)
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(model=model, volume=volume, embedding=embedding, **taken)


def test_names_and_shapes_are_the_published_ones(recorded: Path) -> None:
    rows = (recorded / "sam_med3d_vit_b_ori.tsv").read_text(encoding="utf-8").splitlines()[1:]
    wanted = {
        name: tuple(int(n) for n in shape.split("x"))
        for name, shape, *_ in (row.split("\t") for row in rows)
    }
    with torch.device("meta"):
        model = build_sam_med3d()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == wanted
    assert len(wanted) == 324
    assert sum(parameter.numel() for parameter in model.parameters()) == 100_509_232


def test_encoder_matches_the_published_one(recorded: Path, published: SimpleNamespace) -> None:
    wanted = np.load(recorded / "sam_med3d_encoder.npz")
    close(published.embedding[:, ::8], wanted["embedding"], 3e-5)
    for name in ("patch", "block0", "block2"):
        close(getattr(published, name)[..., ::32], wanted[name], 3e-5)


def test_corrected_encoder_matches_the_intended_one(
    recorded: Path, published: SimpleNamespace, weights: dict[str, torch.Tensor]
) -> None:
    wanted = np.load(recorded / "sam_med3d_encoder_fixed.npz")
    with torch.device("meta"):
        model = build_sam_med3d(rel_pos="corrected")
    model.load_state_dict(weights, strict=True, assign=True)
    corrected = run_encoder(model, published.volume)
    close(corrected.block0[..., ::32], wanted["block0_fixed"], 3e-5)
    close(corrected.block2[..., ::32], wanted["block2_fixed_chain"], 3e-5)
    close(corrected.embedding[:, ::8], wanted["embedding_fixed"], 3e-5)
    with torch.no_grad():
        single = model.image_encoder.blocks[2](published.block1)
    close(single[..., ::32], wanted["block2_fixed_single"], 3e-5)


@torch.no_grad()
def test_prompts_match_the_published_ones(recorded: Path, published: SimpleNamespace) -> None:
    wanted = np.load(recorded / "sam_med3d_prompt.npz")
    rounds = np.load(recorded / "sam_med3d_decoder.npz")
    prompts = published.model.prompt_encoder
    close(prompts.pe_layer.grid(8)[:, ::16], wanted["dense_pe"], 1e-5)
    voxels = torch.from_numpy(wanted["click_voxels"])[None]
    close(prompts.pe_layer((voxels + 0.5) / 128), wanted["click_pe"], 1e-5)
    close(prompts.sparse(clicks(A, labels=[1]), None), wanted["sparse_pos"], 1e-5)
    close(prompts.sparse(clicks(B, labels=[0]), None), wanted["sparse_neg"], 1e-5)
    close(prompts.sparse(clicks(A, B, labels=[1, 0]), None), wanted["sparse_two"], 1e-5)
    assert prompts.sparse(None, None) is None

    close(prompts.dense(torch.zeros(1, 1, 32, 32, 32))[:, ::16], wanted["dense_zero_mask"], 1e-5)
    random = np.random.RandomState(9).standard_normal((2, 1, 32, 32, 32)).astype(np.float32)
    close(prompts.dense(torch.from_numpy(random))[:, ::32], wanted["dense_random_mask"], 1e-5)
    for name, mask in (("dense_two", "round1"), ("dense_maskonly", "round2")):
        close(prompts.dense(torch.from_numpy(rounds[mask]))[:, ::16], wanted[name], 6e-5)
    without = prompts.dense(None)
    assert without.shape == (1, 384, 8, 8, 8)
    close(without[..., 3, 1, 7], wanted["dense_no_mask"], 1e-5)


@torch.no_grad()
def test_rounds_match_the_published_ones(recorded: Path, published: SimpleNamespace) -> None:
    wanted = np.load(recorded / "sam_med3d_decoder.npz")
    more = np.load(recorded / "sam_med3d_decoder_more.npz")
    model, embedding = published.model, published.embedding
    zero = torch.zeros(1, 1, 32, 32, 32)
    first = model.decode(embedding, clicks(A, labels=[1]), zero)
    close(first, wanted["round1"], 3e-5)
    second = model.decode(embedding, clicks(A, B, labels=[1, 0]), first)
    close(second, wanted["round2"], 3e-5)
    close(model.decode(embedding, None, second), wanted["maskonly"], 3e-5)

    close(model.upscale(first)[..., 1::7, 1::7, 1::7], more["round1_up128"], 3e-5)
    negative = clicks(B, labels=[0])
    close(model.decode(embedding, negative, zero), more["round1_negative"], 3e-5)
    close(model.decode(embedding, negative, first), more["round2_new_click_only"], 3e-5)
    no_mask = model.decode(embedding, clicks(A, labels=[1]))[..., ::3, ::3, ::3]
    close(no_mask, more["round1_no_mask_embed"], 3e-5)


@torch.no_grad()
def test_decoder_matches_on_a_random_embedding(recorded: Path, published: SimpleNamespace) -> None:
    wanted = np.load(recorded / "sam_med3d_decoder_random_embedding.npz")
    draw = [
        torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
        for seed, shape in ((8, (2, 384, 8, 8, 8)), (9, (2, 1, 32, 32, 32)))
    ]
    coords = torch.tensor([[A, B], [[5, 127, 0], [64, 64, 63]]]).float()
    labels = torch.tensor([[1, 0], [1, 1]])
    first = (coords[:, :1], labels[:, :1])
    for name, points, mask in (
        ("rand_two_clicks_random_mask", (coords, labels), draw[1]),
        ("rand_one_click_zero_mask", first, torch.zeros_like(draw[1])),
        ("rand_maskonly_random_mask", None, draw[1]),
    ):
        logits = published.model.decode(draw[0], points, mask)
        close(logits[..., ::3, ::3, ::3], wanted[name], 3e-5)


@torch.no_grad()
def test_agrees_with_medim(
    published: SimpleNamespace, weights: dict[str, torch.Tensor], monkeypatch
) -> None:
    medim = pytest.importorskip("medim", reason="pip install medim requests to compare with it")
    with torch.device("meta"):
        peer = medim.create_model("SAM-Med3D", pretrained=False)
    peer.load_state_dict(weights, strict=True, assign=True)
    # Its blocks take a second each; three hold both kinds. benchmarks/encoder3d.py runs all.
    embeddings = []
    for encoder in (published.model.image_encoder, peer.image_encoder):
        monkeypatch.setattr(encoder, "blocks", encoder.blocks[:3])
        embeddings.append(encoder(published.volume))
    torch.testing.assert_close(*embeddings, rtol=0, atol=3e-5)

    mask = torch.randn(1, 1, 32, 32, 32)
    for points in (clicks(A, B, labels=[1, 0]), clicks([5, 6, 7], labels=[0]), None):
        sparse, dense = peer.prompt_encoder(points=points, boxes=None, masks=mask)
        if points is not None:
            ours = published.model.prompt_encoder.sparse(points, None)
            torch.testing.assert_close(ours, sparse, rtol=0, atol=1e-5)
        wanted, _ = peer.mask_decoder(
            image_embeddings=published.embedding,
            image_pe=peer.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        found = published.model.decode(published.embedding, points, mask)
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)
