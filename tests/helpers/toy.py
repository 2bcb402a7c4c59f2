"""A small network and a small data set with U-SAM's interfaces, for tests of the training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from usam.runtime.precision import Precision
from usam.runtime.samplers import TrainingBatches
from usam.training.checkpoint import Progress, TrainingState
from usam.training.ema import WeightAverage
from usam.training.engine import Recipe, train_one_epoch
from usam.training.losses import segmentation_loss
from usam.training.optimizer import build_optimizer

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, None)
SIDE = 8


class Toy(nn.Module):
    """Two convolutions with a BatchNorm between; prompts shift the logits, so they matter."""

    def __init__(self, num_classes: int = 3, *, norm: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.inner = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.outer = nn.Conv2d(4, num_classes, 1)
        self.prompt = nn.Linear(4, num_classes)

    def forward(
        self, image: Tensor, points: tuple[Tensor, Tensor] | None = None, boxes: Any = None
    ) -> Tensor:
        given = image.new_zeros(len(image), 4) if boxes is None else boxes / SIDE
        if points is not None:
            given = given + points[0].mean(dim=1).repeat(1, 2) / SIDE
        logits = self.outer(self.norm(self.inner(image)).relu())
        return logits + self.prompt(given.to(logits.dtype))[:, :, None, None]


class Slices(Dataset):
    """`number` random slices; `self[index, epoch]` is `self[index]`."""

    def __init__(self, number: int, num_classes: int = 3, side: int = SIDE) -> None:
        generator = torch.Generator().manual_seed(number)
        size = (number, 1, side, side)
        self.images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
        self.masks = (self.images[:, 0].int() * num_classes // 256).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[0] if isinstance(key, tuple) else key
        return {"image": self.images[index], "mask": self.masks[index], "id": f"slice{index}"}


def training_loader(data: Dataset, batch_size: int, *, num_workers: int = 0) -> DataLoader:
    """A loader as u-sam.py makes it for training."""
    batches = TrainingBatches(len(data), batch_size, seed=5)
    return DataLoader(data, batch_sampler=batches, num_workers=num_workers)


def plain_step(model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
    """U-SAM's loss without augmentation and prompts."""
    return segmentation_loss(model(batch["image"].float() / 255), batch["mask"].long())


def one_group(model: nn.Module, lr: float = 1e-3) -> torch.optim.AdamW:
    """The optimizer of a run whose parameters share one rate."""
    return build_optimizer([{"params": list(model.parameters()), "lr": lr}], weight_decay=1e-4)


def train(model: nn.Module, loader: DataLoader, optimizer: Any, **changes: Any) -> dict[str, Any]:
    """One epoch of `train_one_epoch`, in float32 and with a plain recipe unless `changes` say."""
    how = {
        "step": plain_step,
        "recipe": Recipe(seed=5, total_samples=1000),
        "precision": FLOAT32,
    } | changes
    own = {name: how.pop(name, None) for name in ("scaler", "average", "progress")}
    plain = getattr(model, "module", model)
    state = TrainingState(
        plain, optimizer, own["scaler"] or how["precision"].scaler(),
        own["average"] or WeightAverage(plain, 0.0), facts={},
    )  # fmt: skip
    state.progress = own["progress"] or Progress()
    return train_one_epoch(model, loader, state, **how)
