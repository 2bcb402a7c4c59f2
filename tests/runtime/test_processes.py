"""Several processes: who works on what, gradients shared, counts summed, rank 0's statistics.

One launch of three gloo processes (two of which then go on alone) computes all that is compared.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.toy import CPU, FLOAT32, Slices, Toy, one_group, train, training_loader
from usam.cli.choices import MIXED
from usam.evaluation.pixels import count_pixels
from usam.models.prompts import mixed_mode
from usam.models.usam import build_usam
from usam.runtime import processes
from usam.runtime.samplers import EvaluationShard, TrainingBatches
from usam.training import engine
from usam.training.checkpoint import Progress
from usam.training.engine import Recipe, step_generator
from usam.training.usam import SegmentationStep

COUNTS = range(1, 10)  # samples
WORLDS = (1, 2, 3)
BATCH = 2
PROMPT_MODES = (0, 3)  # no prompt, and every kind


def evaluation_counts(number: int) -> torch.Tensor:
    """Counts of a toy network on `number` slices, as this process sees them in the end."""
    torch.manual_seed(0)
    data = Slices(number)
    loader = DataLoader(data, sampler=EvaluationShard(len(data)), batch_size=BATCH)
    return count_pixels(Toy(), loader, prompt_mode=1, precision=FLOAT32).tensor


def batches_of_an_epoch(number: int, epoch: int = 2) -> list[list[tuple[int, int]]]:
    batches = TrainingBatches(number, BATCH, seed=5)
    batches.epoch = epoch
    assert len(list(batches)) == len(batches)
    return list(batches)


def no_augmentation(image: Any, mask: Any, generator: torch.Generator) -> tuple[Any, Any]:
    return image, mask


def tiny_usam() -> nn.Module:
    torch.manual_seed(3)
    return build_usam("vit_tiny", num_classes=3, img_size=32)


def toy() -> nn.Module:
    torch.manual_seed(3)
    return Toy()


def gradients_of_first_step(
    build: Callable[[], nn.Module], accumulation: int, prompt_mode: int | str
) -> dict[str, dict[str, torch.Tensor]]:
    """The gradients that the first step of an epoch of two steps hands to the optimizer."""
    model, seen = build(), {}

    def note(*_: Any) -> None:
        for name, p in model.named_parameters():
            if p.grad is not None and name not in seen:
                seen[name] = p.grad.clone()

    optimizer = one_group(model)
    optimizer.register_step_pre_hook(note)
    number = 2 * accumulation * BATCH * processes.world_size()
    train(
        processes.wrap(model, CPU), training_loader(Slices(number, side=32), BATCH), optimizer,
        step=SegmentationStep(CPU, no_augmentation, prompt_mode), progress=Progress(),
        recipe=Recipe(seed=5, total_samples=100, accumulation_steps=accumulation),
    )  # fmt: skip
    return {"gradients": seen, "weights": model.state_dict()}


def nan_on_rank_1() -> dict[str, Any]:
    """Weights before and after an epoch whose every loss is NaN on rank 1 only."""
    torch.manual_seed(3)
    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = SegmentationStep(CPU, no_augmentation, 1)

    def step(*given: Any) -> torch.Tensor:
        return plain(*given) * (math.nan if processes.rank() == 1 else 1)

    line = train(
        processes.wrap(model, CPU), training_loader(Slices(12), BATCH), one_group(model),
        step=step, progress=Progress(),
    )  # fmt: skip
    return {"before": before, "after": dict(model.named_parameters()), "line": line}


def turns(folder: Path) -> bool:
    """Whether rank 0 had ended before this process began."""
    done = folder / f"done-{processes.world_size()}"
    with processes.main_process_first():
        if processes.is_main():
            time.sleep(0.3)
            done.touch()
        return done.exists()


def statistics_after_broadcast() -> dict[str, torch.Tensor]:
    model = Toy()
    for buffer in model.buffers():
        buffer.fill_(7 + processes.rank())
    processes.broadcast_buffers(model)
    return dict(model.named_buffers())


def what_differs() -> dict[str, bool]:
    """Whether each check raises, of things that are the same on all ranks or not."""
    model, drifted = toy(), toy()
    with torch.no_grad():  # by the last bit of one weight
        bits = drifted.inner.weight.view(torch.int32).view(-1)
        bits[7] ^= int(processes.rank() == 1)

    def raises(check: Callable[..., None], *given: Any) -> bool:
        try:
            check(*given)
        except ValueError as error:
            return "processes" in str(error)
        return False

    return {
        "weights": raises(processes.check_same_weights, model, 0),
        "drifted": raises(processes.check_same_weights, drifted, 0),
        "text": raises(processes.check_same, "a listing", "the listings"),
        "texts": raises(processes.check_same, f"{processes.rank()}", "the listings"),
    }


def of_one_world(rank: int, folder: Path) -> dict[str, Any]:
    """What a process of two or three finds out."""
    found: dict[str, Any] = {
        "rank": processes.rank(),
        "batches": {number: batches_of_an_epoch(number) for number in COUNTS},
        "counts": {number: evaluation_counts(number) for number in COUNTS},
        "buffers": statistics_after_broadcast(),
        "turns": turns(folder),
        "sum": processes.reduce_sum(torch.tensor([rank + 1])).item(),
        "rows": processes.gather(torch.tensor([rank, 7])).tolist(),
        "told": processes.from_main(lambda: 40 + rank),
        "differs": what_differs(),
    }
    if processes.world_size() == 2:
        found["steps"] = {
            mode: gradients_of_first_step(tiny_usam, 1, mode) for mode in (*PROMPT_MODES, MIXED)
        }
        found["accumulated"] = gradients_of_first_step(toy, 3, 1)
        found["nan"] = nan_on_rank_1()
    return found


def process(rank: int, ports: tuple[int, int], folder: Path) -> None:
    """One of three processes; the last one leaves when it is the turn of two."""
    torch.set_num_threads(1)
    for world, port in zip((3, 2), ports, strict=True):
        if rank < world:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            assert processes.start("cpu") == CPU
            torch.save(of_one_world(rank, folder), folder / f"{world}-{rank}.pt")
            processes.stop()


def free_ports(number: int) -> tuple[int, ...]:
    with_ports = [socket.socket() for _ in range(number)]
    for place in with_ports:
        place.bind(("127.0.0.1", 0))
    ports = tuple(place.getsockname()[1] for place in with_ports)
    for place in with_ports:
        place.close()
    return ports


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """For each number of processes what each rank found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (free_ports(2), folder), nprocs=3)
    worlds = {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for world in (2, 3)
    }
    alone = {
        "batches": {number: batches_of_an_epoch(number) for number in COUNTS},
        "counts": {number: evaluation_counts(number) for number in COUNTS},
    }
    return {1: [alone]} | worlds


# ----------------------------------------------------------------- shares of the data


@pytest.mark.parametrize("world", WORLDS)
def test_evaluation_counts_every_sample_once(found: Any, world: int) -> None:
    for number in COUNTS:
        wanted = found[1][0]["counts"][number]
        assert int(wanted.sum()) == number * 64
        for of_rank in found[world]:
            assert torch.equal(of_rank["counts"][number], wanted), (number, world)


@pytest.mark.parametrize("world", WORLDS)
def test_training_batches_deal_each_step_out_among_the_ranks(found: Any, world: int) -> None:
    for number in COUNTS:
        of_ranks = [of_rank["batches"][number] for of_rank in found[world]]
        size = BATCH * world
        assert {len(batches) for batches in of_ranks} == {max(number // size, 1)}
        seen: list[int] = []
        for step in zip(*of_ranks, strict=True):
            assert {epoch for share in step for _, epoch in share} == {2}
            indices = [index for share in step for index, _ in share]
            if number >= world:
                assert len(set(indices)) == len(indices) == min(size, number)
            seen += indices
        if number >= world:
            assert len(set(seen)) == len(seen)
        if number < size:  # the only batch, which is not dropped
            assert set(seen) == set(range(number))


@pytest.mark.parametrize("world", WORLDS)
def test_steps_hold_the_same_samples_whatever_the_number_of_processes(
    found: Any, world: int
) -> None:
    alone = TrainingBatches(9, BATCH * world, seed=5)
    alone.epoch = 2
    of_ranks = [of_rank["batches"][9] for of_rank in found[world]]
    for block, *shares in zip(alone, *of_ranks, strict=True):
        assert sorted(block) == sorted(pair for share in shares for pair in share)


def test_fewer_samples_than_processes_are_served_twice(found: Any) -> None:
    for number in (1, 2):
        shares = [of_rank["batches"][number] for of_rank in found[3]]
        assert all(len(batches) == len(batches[0]) == 1 for batches in shares)
        assert {batches[0][0][0] for batches in shares} == set(range(number))


def test_epochs_and_seeds_shuffle_and_an_epoch_is_entered_in_the_middle() -> None:
    batches = TrainingBatches(20, 4, seed=5)
    first = list(batches)
    batches.epoch = 1
    second = list(batches)
    assert [i for batch in first for i, _ in batch] != [i for batch in second for i, _ in batch]
    assert sorted(i for batch in second for i, _ in batch) == list(range(20))
    batches.first_step = 3
    assert list(batches) == second[3:]
    assert len(batches) == 5
    assert list(TrainingBatches(20, 4, seed=6)) != first
    with pytest.raises(ValueError, match="no training samples"):
        TrainingBatches(0, 4, seed=5)


# --------------------------------------------------------------------- gradients, state


def gradients_alone(
    build: Callable[[], nn.Module], rank: int, *, accumulation: int, mode: int | str
) -> dict[str, Any]:
    """Gradients of one of two ranks' batches of the first step, computed in this process."""
    model = build().train()
    data = Slices(4 * accumulation * BATCH, side=32)
    order = TrainingBatches(len(data), 2 * BATCH, seed=5)
    step = SegmentationStep(CPU, no_augmentation, mode)
    for number, block in zip(range(accumulation), order, strict=False):
        items = [data[pair] for pair in block[rank::2]]
        batch = {key: torch.stack([item[key] for item in items]) for key in ("image", "mask")}
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(engine, "rank", lambda: rank)
            (step(model, batch, step_generator(5, 0, number, rank)) / accumulation).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_mean_of_halves(found: list[dict[str, Any]], halves: list[dict[str, Any]]) -> None:
    assert halves[0].keys() == halves[1].keys()
    wanted = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    for of_rank in found:
        torch.testing.assert_close(of_rank, wanted, rtol=1e-4, atol=1e-7)
    last = list(halves[0])[-1]
    assert not torch.allclose(halves[0][last], halves[1][last], rtol=1e-2)


@pytest.mark.parametrize("mode", [*PROMPT_MODES, MIXED])
def test_gradients_are_the_mean_of_the_half_batches_run_alone(found: Any, mode: int | str) -> None:
    halves = [gradients_alone(tiny_usam, rank, accumulation=1, mode=mode) for rank in (0, 1)]
    assert_mean_of_halves([of_rank["steps"][mode]["gradients"] for of_rank in found[2]], halves)


def test_accumulated_gradients_are_the_mean_too(found: Any) -> None:
    halves = [gradients_alone(toy, rank, accumulation=3, mode=1) for rank in (0, 1)]
    assert_mean_of_halves([of_rank["accumulated"]["gradients"] for of_rank in found[2]], halves)


@pytest.mark.parametrize("mode", [*PROMPT_MODES, MIXED])
def test_weights_stay_equal_on_all_ranks_and_statistics_their_own(
    found: Any, mode: int | str
) -> None:
    first, second = (of_rank["steps"][mode]["weights"] for of_rank in found[2])
    parameters = dict(tiny_usam().named_parameters()).keys()
    assert all(torch.equal(first[name], second[name]) for name in parameters)
    mean = "backbone.inc.norm.running_mean"
    assert not torch.equal(first[mean], second[mean])


def test_all_ranks_draw_the_same_mode_in_a_step_and_others_in_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = {}
    for rank in (0, 1, 2):
        monkeypatch.setattr(engine, "rank", lambda rank=rank: rank)
        drawn[rank] = [
            mixed_mode(engine.shared_generator(step_generator(5, 1, step, rank)))
            for step in range(400)
        ]
    assert drawn[0] == drawn[1] == drawn[2]
    shares = torch.tensor(drawn[0]).bincount() / 400
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.07)


@pytest.mark.parametrize("world", [2, 3])
def test_rank_0s_statistics_reach_all(found: Any, world: int) -> None:
    for of_rank in found[world]:
        assert {float(value.min()) for value in of_rank["buffers"].values()} == {7.0}
        assert {float(value.max()) for value in of_rank["buffers"].values()} == {7.0}


def test_a_nan_on_one_rank_leaves_the_step_out_on_all(found: Any) -> None:
    for of_rank in found[2]:
        result = of_rank["nan"]
        assert result["line"]["skipped_steps"] == 3
        torch.testing.assert_close(result["after"], result["before"], rtol=0, atol=0)
    losses = [of_rank["nan"]["line"]["loss"] for of_rank in found[2]]
    assert math.isfinite(losses[0])  # of the finite losses, which are rank 0's
    assert losses[0] == losses[1]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_sum_and_rank_0_comes_first(found: Any, world: int) -> None:
    assert [of_rank["rank"] for of_rank in found[world]] == list(range(world))
    assert {of_rank["sum"] for of_rank in found[world]} == {sum(range(world + 1))}
    assert all(of_rank["turns"] for of_rank in found[world])
    assert all(of_rank["rows"] == [[n, 7] for n in range(world)] for of_rank in found[world])
    assert {of_rank["told"] for of_rank in found[world]} == {40}


@pytest.mark.parametrize("world", [2, 3])
def test_weights_and_listings_that_differ_between_ranks_are_an_error_on_all(
    found: Any, world: int
) -> None:
    wanted = {"weights": False, "drifted": True, "text": False, "texts": True}
    assert all(of_rank["differs"] == wanted for of_rank in found[world])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_fingerprints_tell_every_bit_and_place_apart(dtype: torch.dtype) -> None:
    values = (torch.arange(8) % 2).to(dtype).view(2, 4)
    seen = {int(processes.fingerprint(values)), int(processes.fingerprint(values.flip(1)))}
    for byte in range(values.numel() * values.element_size()):
        changed = values.clone()
        changed.view(torch.uint8).view(-1)[byte] ^= 1
        seen.add(int(processes.fingerprint(changed)))
    assert len(seen) == 2 + values.numel() * values.element_size()
