"""U-SAM gives the published network's numbers, names and shapes, and trains alike in every mode.

The recorded numbers in tests/data come from the published code with the weights of tests/fill.py.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.fill import fill, image
from usam.models.usam import USam, build_usam

FROZEN = "sam.prompt_encoder.point_embeddings.0.weight"
PUBLISHED_PARAMETERS = 104_155_791
CASES = ["224_c3_p0", "224_c3_p1", "224_c3_p2", "224_c3_p3", "224_c17_p0", "256_c3_p0"]


@functools.cache  # the models share nearly all tensors, and drawing them takes seconds
def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(fill(name, shape))


@functools.lru_cache(maxsize=1)  # ViT-B, 0.4 GB: one at a time
def filled_model(num_classes: int, img_size: int) -> USam:
    model = build_usam("vit_b", num_classes, img_size).eval()
    values = {name: filled(name, tuple(value.shape)) for name, value in model.state_dict().items()}
    model.load_state_dict(values)
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, recorded):
    """A recorded case, the model it belongs to and its image."""
    numbers = dict(np.load(recorded / f"usam_{request.param}.npz"))
    size = int(numbers["img_size"])
    model = filled_model(int(numbers["num_classes"]), size)
    return numbers, model, torch.from_numpy(image(7, (2, 1, size, size)))


def prompts_of(numbers: dict) -> dict:
    prompts = {}
    if "points" in numbers:
        labels = torch.from_numpy(numbers["point_labels"])
        prompts["points"] = (torch.from_numpy(numbers["points"]).float(), labels)
    if "boxes" in numbers:
        prompts["boxes"] = torch.from_numpy(numbers["boxes"]).float()
    return prompts


@torch.inference_mode()
def test_logits_equal_the_published_network(case):
    numbers, model, pixels = case
    logits = model(pixels, **prompts_of(numbers)).numpy()
    std = numbers["logits_std"]
    assert np.abs(logits[:, :, ::8, ::8] - numbers["logits"]).max() <= 5e-5 * std
    assert abs(logits.mean(dtype=np.float64) - numbers["logits_mean"]) <= 1e-5 * std
    assert abs(logits.std(dtype=np.float64) - std) <= 1e-5 * std
    classes = logits.argmax(1).reshape(2, -1)
    counts = np.stack([np.bincount(c, minlength=logits.shape[1]) for c in classes])
    assert np.abs(counts - numbers["argmax_counts"]).max() <= 5


@torch.inference_mode()
def test_inner_results_equal_the_published_network(case):
    numbers, model, pixels = case
    encoder, prompt_encoder = model.sam.image_encoder, model.sam.prompt_encoder
    found = {}
    if "image_embedding" in numbers:
        tokens = model.backbone(model.normalise(pixels))[1].permute(0, 2, 3, 1)
        found["bottleneck"] = tokens[..., ::32]
        found["image_embedding"] = encoder(tokens)[:, ::16]
        found["dense_pe"] = prompt_encoder.get_dense_pe()[:, ::16]
    if "sparse_embeddings" in numbers:
        found["sparse_embeddings"] = prompt_encoder(**prompts_of(numbers))[0]
    for name in found.keys() & numbers.keys():
        np.testing.assert_allclose(found[name].numpy(), numbers[name], rtol=0, atol=5e-5)


def test_one_channel_and_three_equal_channels_agree():
    model = tiny().eval()
    pixels = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(pixels), model(pixels.repeat(1, 3, 1, 1)))


def read_shapes(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def shape_of(text: str) -> tuple[int, ...]:
    return () if text == "scalar" else tuple(int(n) for n in text.split(","))


@pytest.mark.parametrize("change", [None, "224_c17", "256_c3"])
def test_names_and_shapes_are_the_published_ones(recorded, change):
    entries = read_shapes(recorded / "usam_vit_b_224_c3.tsv")
    shapes = {entry["name"]: shape_of(entry["shape"]) for entry in entries}
    if change:
        changed = read_shapes(recorded / f"usam_vit_b_{change}.diff.tsv")
        shapes |= {entry["name"]: shape_of(entry["shape"]) for entry in changed}
    size, classes = (change or "224_c3").split("_c")
    with torch.device("meta"):
        model = build_usam("vit_b", int(classes), int(size))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == {name: shapes[name] for name in found}
    absent = shapes.keys() - found.keys()
    assert not absent & {entry["name"] for entry in entries if entry["used"] == "yes"}


def test_parameter_count_is_the_published_one_without_the_unused(recorded):
    unused = sum(
        int(np.prod(shape_of(entry["shape"])))
        for entry in read_shapes(recorded / "usam_vit_b_224_c3.tsv")
        if entry["used"] == "no" and entry["trained"] == "no"
    )
    with torch.device("meta"):
        model = build_usam()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == PUBLISHED_PARAMETERS - unused
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [FROZEN]


@pytest.mark.parametrize(("name", "width"), [("vit_l", 1024), ("vit_h", 1280)])
def test_down_path_follows_the_encoders_width(name, width):
    with torch.device("meta"):
        model = build_usam(name)
        tokens = model.backbone(torch.rand(1, 3, 224, 224))[1].permute(0, 2, 3, 1)
        assert model.sam.image_encoder(tokens).shape == (1, 256, 14, 14)
    assert model.backbone.down4.nConvs[1].conv.weight.shape == (width, width, 3, 3)


def tiny(**changes) -> USam:
    torch.manual_seed(1)
    return build_usam(**({"sam_model": "vit_tiny", "img_size": 64} | changes))


POINTS = (torch.tensor([[[10.0, 20.0], [30.0, 5.0]]] * 2), torch.tensor([[1, -1]] * 2))
BOXES = torch.tensor([[4.0, 4.0, 40.0, 50.0]] * 2)
MODES = [{}, {"boxes": BOXES}, {"points": POINTS}, {"points": POINTS, "boxes": BOXES}]


@pytest.mark.parametrize("mode", range(4))
def test_every_trained_parameter_has_a_gradient_in_every_mode(mode):
    model = tiny()
    model(torch.rand(2, 1, 64, 64), **MODES[mode]).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    gradients = {
        n: p.grad.abs().max()
        for n, p in model.sam.prompt_encoder.named_parameters()
        if p.requires_grad
    }
    assert (gradients["point_embeddings.1.weight"] > 0) == ("points" in MODES[mode])
    assert (gradients["point_embeddings.2.weight"] > 0) == ("boxes" in MODES[mode])


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("img_size", [64, 256])
def test_bf16_autocast_trains_and_gives_float_logits(mode, img_size):
    model = tiny(img_size=img_size)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(2, 1, img_size, img_size), **MODES[mode])
    assert logits.dtype == torch.float32
    logits.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bf16_autocast_stays_near_float32():
    model = tiny().eval()
    pixels = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        exact = model(pixels, **MODES[3])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(pixels, **MODES[3])
    assert (rounded - exact).abs().max() < 0.1 * exact.std()


@torch.inference_mode()
def test_points_are_xy_and_labels_matter():
    model = tiny().eval()
    pixels, coords = torch.rand(1, 1, 64, 64), torch.tensor([[[50.0, 8.0]]])
    logits = [model(pixels, points=(coords, torch.tensor([[label]]))) for label in (1, 0, -1)]
    flipped = model(pixels, points=(coords.flip(-1), torch.tensor([[1]])))
    assert not any(torch.equal(logits[0], other) for other in (*logits[1:], flipped))


@torch.inference_mode()
def test_position_of_a_not_a_point_does_not_matter():
    model = tiny().eval()
    pixels, labels = torch.rand(1, 1, 64, 64), torch.tensor([[1, -1]])
    near, far = (torch.tensor([[[9.0, 9.0], [x, x]]]) for x in (0.0, float("nan")))
    assert torch.equal(model(pixels, points=(near, labels)), model(pixels, points=(far, labels)))


def test_groups_hold_every_trained_parameter_once():
    model = tiny()
    groups = model.parameter_groups(1e-3, 1e-4, 1e-5)
    assert [group["lr"] for group in groups] == [1e-3, 1e-4, 1e-5]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert id(model.backbone.inc.conv.weight) in {id(p) for p in groups[2]["params"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sam_model": "vit_x"}, "vit_b, vit_l, vit_h, vit_t, vit_tiny, found 'vit_x'"),
        ({"adapter": "v"}, "adapter must be one of .*, found 'v'"),
        ({"num_classes": 1}, "found 1"),
        ({"img_size": 100}, "multiple of 16, found 100"),
    ],
)
def test_unknown_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("shape", "prompts", "message"),
    [
        ((2, 1, 32, 32), {}, r"\(N, 1 or 3, 64, 64\), found \(2, 1, 32, 32\)"),
        ((2, 2, 64, 64), {}, "found"),
        ((3, 1, 64, 64), {"boxes": BOXES}, "boxes: 2 given for a batch of 3"),
        ((1, 1, 64, 64), {"points": POINTS}, "points: 2 given for a batch of 1"),
    ],
)
def test_input_that_does_not_fit_is_refused(shape, prompts, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.rand(shape), **prompts)


def test_batchnorm_folded_into_convolutions_gives_the_same_and_learns_nothing() -> None:
    model = build_usam("vit_tiny", 3, 32)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = torch.rand(2, 1, 32, 32)
    unfolded = model.eval()(pixels).detach()
    with torch.no_grad():
        folded = model(pixels)
    assert not torch.equal(folded, unfolded)  # another order of sums: it was folded
    torch.testing.assert_close(folded, unfolded, rtol=1e-4, atol=1e-4 * unfolded.std().item())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
