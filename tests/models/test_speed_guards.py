"""What a training step costs, in numbers that no busy machine can change: FLOPs, operations, bytes.

Most run on torch's meta device, which has shapes but no values: nothing is computed, and reading
a value back, as a wait for a GPU would, is an error.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dataset.transforms import augment
from usam.cli.choices import PROMPT_MODES
from usam.models.prompts import prompts_from_masks
from usam.models.usam import USam, build_usam
from usam.training.epoch_sums import FiniteGuard
from usam.training.losses import segmentation_loss
from usam.training.usam import SegmentationStep

META = torch.device("meta")
PUBLISHED_GFLOP = 50.3, 150.5  # forward, with backward; an image of 224 x 224, ViT-B, 3 classes
PUBLISHED_OPERATIONS = 807, 2057
PUBLISHED_SAVED = 286e6  # bytes an image
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "detach", "alias", "split", "unbind", "as_strided", "split_with_sizes",
}  # fmt: skip


class CountOperations(TorchDispatchMode):
    """Operations that do something, in `.number`."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def on_meta(img_size: int = 224, sam_model: str = "vit_b") -> USam:
    with META:
        return build_usam(sam_model, 3, img_size).train()


def batch(number: int, size: int, device: torch.device | str = META) -> dict:
    return {
        "image": torch.zeros(number, 1, size, size, dtype=torch.uint8, device=device),
        "mask": torch.zeros(number, size, size, dtype=torch.uint8, device=device),
    }


def forward_and_backward(model: USam, number: int, size: int, counter) -> tuple[float, float]:
    """What `counter` (a function of no arguments) says after the forward pass and after both."""
    loss = model(torch.zeros(number, 1, size, size, device=META)).sum()
    forward = counter()
    loss.backward()
    return forward, counter()


def test_no_more_flops_than_the_network_needs():
    with FlopCounterMode(display=False) as flops:
        counts = forward_and_backward(on_meta(), 1, 224, flops.get_total_flops)
    for found, published in zip(counts, PUBLISHED_GFLOP, strict=True):
        assert found / 1e9 == pytest.approx(published, rel=0.02)


def test_padded_tokens_cost_nothing():
    # At 112 pixels the grid is 7 x 7; padded to SAM's windows of 14 it would be four times that.
    with FlopCounterMode(display=False) as flops:
        small, _ = forward_and_backward(on_meta(112), 1, 112, flops.get_total_flops)
    assert small / 1e9 < PUBLISHED_GFLOP[0] / 4


def test_fewer_operations_than_published():
    model = on_meta()
    with CountOperations() as operations:
        counts = forward_and_backward(model, 1, 224, lambda: operations.number)
    assert counts[0] < 0.8 * PUBLISHED_OPERATIONS[0]
    assert counts[1] < 0.9 * PUBLISHED_OPERATIONS[1]


def saved_bytes(model: USam, number: int) -> int:
    """Bytes kept for the backward pass, weights left out."""
    saved, own = {}, {id(p) for p in model.parameters()}

    def keep(x):
        base = x if x._base is None else x._base
        if id(base) not in own:
            saved[id(base)] = base  # kept, so that no id comes twice
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        model(torch.zeros(number, 1, 224, 224, device=META))
    return sum(x.nbytes for x in saved.values())


def test_an_image_saves_no_more_for_backward_than_published():
    model = on_meta()
    one, two = saved_bytes(model, 1), saved_bytes(model, 2)
    assert two - one <= PUBLISHED_SAVED


@pytest.mark.parametrize("mode", PROMPT_MODES)
def test_a_training_step_never_waits_for_the_device(mode):
    model = on_meta(64, "vit_tiny")
    guard = FiniteGuard(model, META)
    step = SegmentationStep(META, augment, mode)
    loss = step(model, batch(2, 64), torch.Generator().manual_seed(3))
    loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    guard.check(optimizer)
    assert optimizer.found_inf.device == META


@pytest.mark.parametrize("mode", [0, 3])
def test_one_graph_compiled_once(mode):
    model = build_usam("vit_tiny", 3, 32).train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        mask = torch.randint(0, 3, (2, 32, 32))
        prompts = prompts_from_masks(mask, 3, mode, torch.Generator())
        segmentation_loss(compiled(torch.rand(2, 1, 32, 32), **prompts), mask).backward()
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
