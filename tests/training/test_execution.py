"""Compiling and recomputing change how a step runs, never what it gives, and can fail safely.

Tiny models on the CPU; a compiler that fails stands in for a machine without one.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from dataset.transforms import augment
from usam.models.usam import build_usam
from usam.runtime.precision import Precision
from usam.training.execution import checkpoint_activations, compile_training, should_compile
from usam.training.usam import SegmentationStep

CPU = torch.device("cpu")
FLOAT = Precision(CPU, None)
COMPILE = torch.nn.Module.compile
STEP = SegmentationStep(CPU, augment)


def samples(number: int = 2) -> list[dict]:
    image = torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8)
    mask = torch.randint(0, 3, (32, 32), dtype=torch.uint8)
    return [{"image": image, "mask": mask, "id": "a"}] * number


@pytest.fixture
def stance():
    """Leave the compiler's stance and caches as they were."""
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def test_auto_compiles_slices_on_cuda_only():
    cuda = torch.device("cuda")
    assert should_compile("auto", "u-sam", cuda)
    assert not should_compile("auto", "sam-med3d", cuda)
    assert not should_compile("auto", "u-sam", CPU)
    assert should_compile("on", "u-sam", CPU)
    assert not should_compile("off", "u-sam", cuda)


def test_failed_compile_warns_once_and_goes_on(stance, monkeypatch):
    model = build_usam("vit_tiny", 3, 32)
    before = copy.deepcopy(model.state_dict())

    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: COMPILE(self, backend=no_compiler))
    with pytest.warns(UserWarning, match="--compile failed.*no C\\+\\+ compiler found") as seen:
        assert not compile_training(model, STEP, samples(), FLOAT)
    assert len(seen) == 1
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(model(torch.rand(1, 1, 32, 32))).all()


def test_compiling_leaves_weights_and_statistics_alone(stance, monkeypatch):
    model = build_usam("vit_tiny", 3, 32)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: COMPILE(self, backend="aot_eager"))
    assert compile_training(model, STEP, samples(), FLOAT)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputing_gives_the_same_gradients(dtype):
    plain = build_usam("vit_tiny", 3, 32)
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    assert list(plain.state_dict()) == list(again.state_dict())
    image, mask = torch.rand(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32))
    for model in (plain, again):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(image)
        torch.nn.functional.cross_entropy(logits, mask).backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_recomputing_saves_little_but_each_blocks_input():
    model = build_usam("vit_tiny", 3, 64)
    checkpoint_activations(model)
    tokens = torch.rand(2, 4, 4, 96)
    saved = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model.sam.image_encoder(tokens)
    total = sum(x.nbytes for x in saved if x.untyped_storage().data_ptr() not in weights)
    neck = 4 * 2 * 256 * 4 * 4 * 4  # a few maps of 256 channels, float32
    assert total < 5 * tokens.nbytes + 3 * neck


@torch.no_grad()
def test_recomputing_does_not_change_evaluation():
    plain = build_usam("vit_tiny", 3, 32).eval()
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(plain(image), again(image))
