"""The training loop: steps, rates, faults in the numbers, and going on in mid-epoch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset.transforms import augment
from tests.helpers.toy import (
    CPU,
    FLOAT32,
    Slices,
    Toy,
    one_group,
    plain_step,
    train,
    training_loader,
)
from usam.evaluation.pixels import count_pixels, predictions
from usam.models.usam import build_usam
from usam.runtime.loaders import to_device
from usam.runtime.precision import Precision, select_precision
from usam.training.checkpoint import Progress
from usam.training.engine import Recipe, step_generator
from usam.training.optimizer import build_optimizer
from usam.training.usam import SegmentationStep

FLOAT16 = Precision(CPU, torch.float16)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of all that a step may change, but BatchNorm's statistics."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return copy.deepcopy({"parameters": parameters, "optimizer": optimizer.state_dict()["state"]})


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def faulty(bad_calls: set[int], fault: float = math.nan) -> Any:
    """`plain_step` whose loss is multiplied by `fault` in the calls numbered in `bad_calls`."""
    calls = iter(range(10**6))

    def step(model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Any:
        loss = plain_step(model, batch, generator)
        return loss * fault if next(calls) in bad_calls else loss

    return step


def gradients_seen(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """The gradients of each coming step, as the optimizer gets them."""
    seen: list[list[torch.Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        seen.append([p.grad.clone() for g in groups for p in g["params"] if p.grad is not None])

    optimizer.register_step_pre_hook(note)
    return seen


# ------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("clip_max_norm", [0.0, 0.1])
def test_a_loss_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(
    fault: float, clip_max_norm: float
) -> None:
    model = Toy()
    optimizer, states = one_group(model), []
    line = train(
        model, training_loader(Slices(10), 2), optimizer,
        step=faulty({2}, fault), progress=Progress(),
        recipe=Recipe(seed=5, total_samples=1000, clip_max_norm=clip_max_norm),
        after_step=lambda sums: states.append(state_of(model, optimizer)),
    )  # fmt: skip
    assert_same(states[2], states[1])
    assert not torch.equal(
        states[3]["parameters"]["inner.weight"], states[2]["parameters"]["inner.weight"]
    )
    assert line["skipped_steps"] == 1
    assert math.isfinite(line["loss"])


def test_the_mean_loss_is_that_of_the_finite_losses() -> None:
    model, losses = Toy(), []

    def step(*given: Any) -> torch.Tensor:
        losses.append(plain_step(*given))
        return losses[-1] * (math.nan if len(losses) == 2 else 1)

    loader = training_loader(Slices(8), 2)
    line = train(model, loader, one_group(model), step=step, progress=Progress())
    kept = [loss.item() for number, loss in enumerate(losses) if number != 1]
    assert line["loss"] == pytest.approx(sum(kept) / 3)
    always = train(model, loader, one_group(model), step=faulty(set(range(9))), progress=Progress())
    assert always["loss"] is None
    assert always["skipped_steps"] == 4


def test_a_nan_in_the_forward_pass_does_not_stay_in_batch_norm() -> None:
    def step(model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Any:
        batch["image"] = batch["image"].float() * (math.nan if "slice3" in batch["id"] else 1)
        return plain_step(model, batch, generator)

    model = Toy()
    line = train(
        model, training_loader(Slices(8), 2), one_group(model), step=step, progress=Progress()
    )
    assert line["skipped_steps"] == 1
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_training_stops_after_twenty_steps_in_a_row_also_over_short_epochs() -> None:
    model, progress = Toy(), Progress()
    optimizer, loader = one_group(model), training_loader(Slices(12), 2)
    step = faulty(set(range(1, 100)))
    train(model, loader, optimizer, step=step, progress=progress)
    before = state_of(model, optimizer)
    for epoch in (1, 2):
        train(model, loader, optimizer, step=step, progress=progress)
        assert progress.skipped_in_a_row == 5 + 6 * epoch
    with pytest.raises(ValueError, match=r"20 steps in a row had no finite gradient.*--lr"):
        train(model, loader, optimizer, step=step, progress=progress)
    assert_same(state_of(model, optimizer), before)


def test_nineteen_steps_in_a_row_are_survived() -> None:
    model, progress = Toy(), Progress()
    loader = training_loader(Slices(44), 2)
    line = train(model, loader, one_group(model), step=faulty(set(range(1, 20))), progress=progress)
    assert line["skipped_steps"] == 19
    assert progress == Progress(epoch=1, samples=44)


# ------------------------------------------------------------------------ gradients


def test_clip_max_norm_bounds_the_norm() -> None:
    def norms(clip_max_norm: float) -> list[float]:
        torch.manual_seed(0)
        model = Toy()
        optimizer = one_group(model)
        seen = gradients_seen(optimizer)
        recipe = Recipe(seed=5, total_samples=1000, clip_max_norm=clip_max_norm)
        loader = training_loader(Slices(8), 2)
        train(model, loader, optimizer, recipe=recipe, progress=Progress())
        return [float(torch.cat([g.flatten() for g in step]).norm()) for step in seen]

    free, clipped = norms(0.0), norms(0.05)
    assert min(free) > 0.1
    assert clipped == pytest.approx([0.05] * 4, rel=1e-3)


@pytest.mark.parametrize("num_batches", range(1, 8))
def test_the_last_batches_of_an_epoch_are_stepped_too(num_batches: int) -> None:
    model, progress, batches = Toy(norm=False), Progress(), []
    optimizer = one_group(model, lr=0.0)  # the weights stay, so that each gradient is known

    def step(model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Any:
        batches.append(batch)
        return plain_step(model, batch, generator)

    seen = gradients_seen(optimizer)
    train(
        model, training_loader(Slices(2 * num_batches), 2), optimizer, step=step,
        recipe=Recipe(seed=5, total_samples=1000, accumulation_steps=3), progress=progress,
    )  # fmt: skip
    assert len(seen) == math.ceil(num_batches / 3)
    assert progress == Progress(epoch=1, samples=2 * num_batches)
    for number, found in enumerate(seen):
        group = batches[3 * number : 3 * number + 3]
        model.zero_grad()
        (
            sum(plain_step(model, batch, torch.Generator()) for batch in group) / len(group)
        ).backward()
        wanted = [p.grad for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(found, wanted)


def test_rates_follow_the_schedule_group_by_group() -> None:
    model, rates = Toy(), []
    groups = [
        {"params": list(model.inner.parameters()), "lr": 1e-3},
        {"params": list(model.outer.parameters()), "lr": 1e-4},
    ]
    optimizer = build_optimizer(groups, weight_decay=1e-4)
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    recipe = Recipe(seed=5, total_samples=20, warmup_samples=5)
    loader, progress = training_loader(Slices(10), 2), Progress()
    lines = [train(model, loader, optimizer, recipe=recipe, progress=progress) for _ in range(2)]
    # Three steps of warm-up (2, 4 and 6 of 5 samples), then (1 - (n - 5) / 20) ** 0.9.
    factors = [0.4, 0.8, 1.0] + [(1 - (n - 5) / 20) ** 0.9 for n in range(6, 20, 2)]
    wanted = [rate for factor in factors for rate in (1e-3 * factor, 1e-4 * factor)]
    assert [rate for step in rates for rate in step] == pytest.approx(wanted)
    assert [line["lr"] for line in lines] == [rates[4][0], rates[9][0]]


# ------------------------------------------------------------------------- float16


def test_float16_trains_with_scaled_gradients() -> None:
    model = Toy()
    optimizer, scaler = one_group(model), FLOAT16.scaler()
    seen = gradients_seen(optimizer)
    before = model.inner.weight.detach().clone()
    line = train(
        model, training_loader(Slices(8), 2), optimizer,
        precision=FLOAT16, scaler=scaler, progress=Progress(),
        recipe=Recipe(seed=5, total_samples=1000, clip_max_norm=1.0),
    )  # fmt: skip
    assert line["skipped_steps"] == 0
    assert not torch.equal(model.inner.weight, before)
    assert all(float(torch.cat([g.flatten() for g in step]).norm()) <= 1.001 for step in seen)
    assert scaler.get_scale() == 65536


def test_float16_leaves_out_and_counts_steps_that_overflow() -> None:
    model, progress = Toy(), Progress()
    optimizer, scaler, states = one_group(model), FLOAT16.scaler(), []
    line = train(
        model, training_loader(Slices(8), 2), optimizer,
        precision=FLOAT16, scaler=scaler, progress=progress, step=faulty({1, 3}, math.inf),
        after_step=lambda sums: states.append(state_of(model, optimizer)),
    )  # fmt: skip
    assert_same(states[1], states[0])
    assert line["skipped_steps"] == 2
    assert progress.skipped_in_a_row == 1
    assert scaler.get_scale() == 65536 / 4


def test_float16_stops_where_no_scale_helps() -> None:
    model = Toy()
    with pytest.raises(ValueError, match="20 steps in a row"):
        train(
            model, training_loader(Slices(50), 2), one_group(model),
            precision=FLOAT16, step=faulty(set(range(100))), progress=Progress(),
        )  # fmt: skip


def test_amp_names_a_precision() -> None:
    names = {amp: str(select_precision(amp, CPU)) for amp in ("bf16", "fp16", "off")}
    assert names == {"bf16": "bfloat16", "fp16": "float16", "off": "float32"}
    assert str(select_precision("auto", CPU)) in ("bfloat16", "float32")
    assert str(select_precision("auto", torch.device("mps"))) == "float32"
    assert not select_precision("bf16", CPU).scaler().is_enabled()


# ------------------------------------------------------------------------ mid-epoch


def usam_setup() -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(3)
    model = build_usam("vit_tiny", num_classes=3, img_size=32)
    return model, build_optimizer(model.parameter_groups(1e-3, 1e-4, 1e-4), 1e-4)


def toy_setup() -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(3)
    model = Toy()
    return model, one_group(model)


@pytest.mark.parametrize(
    ("setup", "side", "accumulation", "stops"),
    [(usam_setup, 32, 2, (2, 4)), (toy_setup, 8, 1, (1, 2, 3, 4)), (toy_setup, 8, 3, (3,))],
)
def test_training_goes_on_with_the_very_next_sample(
    setup: Any, side: int, accumulation: int, stops: tuple[int, ...]
) -> None:
    recipe = Recipe(seed=5, total_samples=20, accumulation_steps=accumulation)
    step = SegmentationStep(CPU, augment, prompt_mode=3)
    kept: dict[int, Any] = {}

    def run(num_workers: int, start: Any = None) -> dict[str, Any]:
        (model, optimizer), progress = setup(), Progress()
        loader = training_loader(Slices(10, side=side), 2, num_workers=num_workers)
        if start:
            progress = Progress(**start[0])
            model.load_state_dict(start[1])
            optimizer.load_state_dict(start[2])
            loader.batch_sampler.first_step = progress.step

        def keep(sums: Any) -> bool:
            states = (vars(progress), model.state_dict(), optimizer.state_dict())
            kept.setdefault(progress.step, copy.deepcopy(states))
            return False

        train(
            model, loader, optimizer,
            recipe=recipe, step=step, progress=progress, after_step=keep,
        )  # fmt: skip
        assert progress == Progress(epoch=1, samples=10)
        return copy.deepcopy({"all": state_of(model, optimizer), "model": model.state_dict()})

    whole = run(0)
    assert sorted(kept) == [*stops, 5]
    for number, at in enumerate(stops):
        assert_same(run(2 * (number % 2), kept[at]), whole)  # no workers, then two


def test_after_step_ends_an_epoch_early_without_counting_it() -> None:
    model, progress = Toy(), Progress()
    loader = training_loader(Slices(10), 2)
    line = train(model, loader, one_group(model), progress=progress, after_step=lambda sums: True)
    assert line is None
    assert progress == Progress(epoch=0, step=1, samples=2)


# ------------------------------------------------------------- batches and evaluation


def test_every_step_epoch_rank_and_seed_draws_otherwise() -> None:
    keys = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 1, 1, 1)]
    draws = {float(torch.rand((), generator=step_generator(*key))) for key in keys}
    assert len(draws) == len(keys)
    again = torch.rand(3, generator=step_generator(1, 2, 3, 4))
    assert torch.equal(again, torch.rand(3, generator=step_generator(1, 2, 3, 4)))


def test_images_come_to_the_model_in_zero_to_one_and_masks_as_labels() -> None:
    batch = {
        "image": torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8),
        "mask": torch.tensor([[[0, 2, 1]]], dtype=torch.uint8),
    }
    image, mask = to_device(batch, CPU)
    torch.testing.assert_close(image, torch.tensor([[[[0.0, 0.2, 1.0]]]]))
    assert mask.tolist() == [[[0, 2, 1]]]
    assert mask.dtype == torch.int64


def test_evaluation_is_the_same_twice_and_changes_nothing() -> None:
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(Slices(7), batch_size=3)
    first, second = (
        count_pixels(model, loader, prompt_mode=3, precision=FLOAT32).tensor for _ in range(2)
    )
    assert torch.equal(first, second)
    assert int(first.sum()) == 7 * 8 * 8
    assert_same(model.state_dict(), before)
    alone = count_pixels(
        model, DataLoader(Slices(7), batch_size=1), prompt_mode=3, precision=FLOAT32
    )
    assert torch.equal(alone.tensor, first)


def test_published_models_get_their_points_as_row_and_column() -> None:
    given = []

    class Listening(Toy):
        def forward(self, image: Any, points: Any = None, boxes: Any = None) -> torch.Tensor:
            given.append(points[0])
            return super().forward(image, points, boxes)

    model, loader = Listening(), DataLoader(Slices(2), batch_size=2)
    drawn = []
    for swapped in (False, True):
        found = predictions(
            model, loader, prompt_mode=2, precision=FLOAT32, points_are_row_col=swapped
        )
        drawn += [prompts["points"][0] for _, _, prompts, _ in found]
    assert torch.equal(drawn[0], drawn[1])  # what a picture shows stays (x, y)
    assert torch.equal(given[0], drawn[0])
    assert torch.equal(given[1], drawn[0].flip(-1))
