"""SAM-Med3D learns: its step, its validation, two processes, and whole runs through u-sam.py."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

from dataset.crops import normalise
from tests.helpers.toy import CPU, FLOAT32, one_group, train, training_loader
from usam.evaluation.clicks import answers_to_clicks, click_dice, click_generator, dice
from usam.models.sam_med3d import SamMed3d, Size
from usam.runtime import processes
from usam.runtime.samplers import EvaluationShard
from usam.training.checkpoint import Progress
from usam.training.engine import Recipe
from usam.training.losses import dice_bce_loss
from usam.training.optimizer import learning_rate_factor
from usam.training.sam_med3d import ClickStep, rounds_loss

SIDE = 32


def micro() -> SamMed3d:
    """The smallest network: one block, eight tokens."""
    torch.manual_seed(3)
    config = {"sam_model": "micro", "rel_pos": "corrected", "num_point_embeddings": 2}
    return SamMed3d(Size(24, 1, 2, (0,), SIDE), config=config)


class Balls(Dataset):
    """Bright balls in noise, each in its own place."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[0] if isinstance(key, tuple) else key
        rng = np.random.default_rng(index)
        grid = np.stack(np.meshgrid(*3 * [np.arange(SIDE)], indexing="ij"), axis=-1)
        mask = np.square(grid - rng.integers(10, 22, 3)).sum(axis=-1) < 60
        image = rng.normal(40, 20, mask.shape) + 100 * mask
        return {
            "image": torch.from_numpy(image.astype(np.int16))[None],
            "mask": torch.from_numpy(mask.astype(np.uint8)),
            "id": f"ball{index}:ball",
        }


def loader(number: int, batch_size: int) -> DataLoader:
    return DataLoader(Balls(number), batch_size=batch_size)


# ------------------------------------------------------------------ the step


def test_loss_is_the_sum_over_rounds_at_full_size() -> None:
    model = micro()
    logits = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
    mask = (torch.rand(2, 1, SIDE, SIDE, SIDE) > 0.5).byte()
    plain = sum(dice_bce_loss(model.upscale(logits[:, k : k + 1]), mask) for k in range(3))
    (wanted,) = torch.autograd.grad(plain, logits)
    loss = rounds_loss(model, logits, mask)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, wanted)


def test_training_lowers_the_loss_and_reaches_every_trained_weight() -> None:
    model, data = micro(), training_loader(Balls(2), 2)
    optimizer, progress = one_group(model, 2e-3), Progress()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(6):
        line = train(model, data, optimizer, step=ClickStep(CPU, 4), progress=progress)
        losses.append(line["loss"])
    assert losses[-1] < 0.8 * losses[0]
    after = dict(model.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]


@pytest.mark.parametrize(
    ("samples", "factor"), [(0, 1), (119, 1), (120, 0.1), (179, 0.1), (180, 0.01), (200, 0.01)]
)
def test_rates_fall_to_a_tenth_at_60_and_90_percent(samples: int, factor: float) -> None:
    found = learning_rate_factor(samples, 1, 200, decay_at=(0.6, 0.9))
    assert found == pytest.approx(factor)


# ------------------------------------------------------------------ validation


def test_dice_of_known_overlaps() -> None:
    logits, mask = torch.full((3, 1, 4, 4, 4), -1.0), torch.zeros(3, 1, 4, 4, 4)
    mask[:, :, :2] = 1
    logits[0, :, 1:3], logits[1], logits[2, 0, 0, 0, 0] = 1, torch.nan, torch.inf
    assert dice(logits, mask).tolist() == [0.5, 0, 0]


def test_clicks_depend_on_the_object_alone() -> None:
    model = micro().eval()
    how = {"normalise": normalise, "precision": FLOAT32, "seed": 7}
    one = click_dice(model, loader(3, 1), **how)
    assert list(one["dice"]) == ["1 click", "3 clicks", "5 clicks", "10 clicks"]
    assert one["mean_dice"] == pytest.approx(sum(one["dice"].values()) / 4)
    together = click_dice(model, loader(3, 3), **how)
    assert together["dice"] == pytest.approx(one["dice"], abs=1e-6)
    draws = [
        torch.rand(1, generator=click_generator(s, n)) for s, n in ((7, "a"), (7, "b"), (8, "a"))
    ]
    assert len(set(map(float, draws))) == 3


def test_every_click_is_kept_and_the_last_answer_is_given_back(monkeypatch) -> None:
    model, seen = micro().eval(), []
    decode = model.decode

    def note(embedding, points, mask):
        seen.append((points[0].shape[1], float(mask.abs().sum())))
        return decode(embedding, points, mask)

    monkeypatch.setattr(model, "decode", note)
    item = Balls(1)[0]
    with torch.no_grad():
        volume, mask = normalise(item["image"][None]), item["mask"][None, None]
        list(answers_to_clicks(model, volume, mask, [click_generator(1, "x")]))
    assert [number for number, _ in seen] == list(range(1, 11))
    assert seen[0][1] == 0 and all(size > 0 for _, size in seen[1:])


# ------------------------------------------------------------------ several processes


def weights_after_epochs(num_batches: int, accumulation: int) -> list[list[float]]:
    """A digest of this process's weights after each of two epochs."""
    model, progress = micro(), Progress()
    wrapped, optimizer = processes.wrap(model, CPU), one_group(model)
    data = training_loader(Balls(num_batches * processes.world_size()), 1)
    digests = []
    for _ in range(2):
        data.batch_sampler.epoch = progress.epoch
        train(
            wrapped, data, optimizer, step=ClickStep(CPU, 2), progress=progress,
            recipe=Recipe(seed=5, total_samples=100, accumulation_steps=accumulation),
        )  # fmt: skip
        digests.append([float(p.detach().double().sum()) for p in model.parameters()])
    return digests


def process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes.start("cpu")
    found = {
        "weights": weights_after_epochs(3, 2),
        "dice": click_dice(
            micro(),
            DataLoader(Balls(3), sampler=EvaluationShard(3)),
            normalise=normalise,
            precision=FLOAT32,
            seed=7,
        ),
    }
    torch.save(found, folder / f"{rank}.pt")
    processes.stop()


def test_two_processes_end_every_epoch_with_equal_weights_and_scores(tmp_path: Path) -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    mp.spawn(process, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first["weights"][0] != first["weights"][1]
    alone = click_dice(micro(), loader(3, 3), normalise=normalise, precision=FLOAT32, seed=7)
    assert first["dice"]["dice"] == pytest.approx(alone["dice"], abs=1e-6)


@pytest.mark.parametrize("num_batches", [1, 20, 41])
def test_any_number_of_batches_trains_with_published_accumulation(num_batches: int) -> None:
    model, steps = micro(), []
    optimizer = one_group(model)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    progress = Progress()
    train(
        model, training_loader(Balls(num_batches), 1), optimizer, progress=progress,
        step=ClickStep(CPU, 1),
        recipe=Recipe(seed=5, total_samples=100, accumulation_steps=20),
    )  # fmt: skip
    assert len(steps) == -(-num_batches // 20)
    assert progress.epoch == 1 and progress.samples == num_batches
