"""A training step of SAM-Med3D against medim's network in a plain loop.

    python -m benchmarks.train_step3d [--quick] [--device cuda] [--threads N] [--rounds N]

Crops lie ready in the host's memory. Ours is the engine's loop with its click rounds; the plain
side samples clicks one by one and sums the rounds' losses at full size, as published.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Row, Work
from benchmarks.train_step import fresh_state
from dataset.crops import normalise
from usam.models.sam_med3d import build_sam_med3d
from usam.runtime.precision import Precision
from usam.training import engine
from usam.training.optimizer import build_optimizer
from usam.training.sam_med3d import ClickStep


class Case(NamedTuple):
    """One comparison: crops a batch, click rounds, our precision ("float32" is exact), blocks."""

    batch: int
    clicks: int
    ours: str
    baseline: str
    goal: str = ""
    blocks: int = 12

    def __str__(self) -> str:
        kind = "exact" if self.ours == "float32" else "precision"
        sizes = f"128^3, batch {self.batch}, {self.clicks} click rounds"
        return f"{kind}: {self.ours} / {self.baseline} eager, {sizes}, {self.blocks} of 12 blocks"


ON_CPU = (Case(1, 3, "float32", "float32"), Case(1, 3, "bfloat16", "float32"))
ON_GPU = (
    Case(4, 11, "float32", "float32"),
    Case(12, 11, "bfloat16", "float32", "8x"),
    Case(12, 11, "bfloat16", "bfloat16"),
)
QUICK = (Case(1, 1, "float32", "float32", "", 1),)
SIDE = 128


class ReadyCrops:
    """A loader for the engine over one batch made beforehand, and its own batch sampler."""

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(-200, 300, (number, 1, *3 * [SIDE]), generator=generator)
        mask = torch.zeros(number, *3 * [SIDE], dtype=torch.uint8)
        mask[:, 30:90, 40:100, 50:80] = 1
        self.batch = {"image": image.to(torch.int16), "mask": mask}
        self.batch_sampler, self.samples_per_step = self, number

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter([self.batch])


def our_work(case: Case, device: torch.device) -> Work:
    """The engine's epoch over one batch."""
    model = build_sam_med3d("vit_b_ori")
    model.image_encoder.blocks = model.image_encoder.blocks[: case.blocks]
    model.to(device)
    precision = Precision(device, dtype_of(case.ours))
    optimizer = build_optimizer(model.parameter_groups(1e-5), 0.1)
    loader, step = ReadyCrops(case.batch), ClickStep(device, case.clicks)
    recipe = engine.Recipe(seed=0, total_samples=10**9)
    return lambda: engine.train_one_epoch(
        model, loader, fresh_state(model, optimizer, precision), step=step, recipe=recipe,
        precision=precision,
    )  # fmt: skip


def plain_work(case: Case, device: torch.device) -> Work:
    """One optimizer step of medim's network in a plain loop."""
    import medim

    model = medim.create_model("SAM-Med3D", pretrained=False)
    model.image_encoder.blocks = model.image_encoder.blocks[: case.blocks]
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    batch, dtype = ReadyCrops(case.batch).batch, dtype_of(case.baseline)

    def work() -> None:
        image = torch.stack([normalise(crop[None])[0] for crop in batch["image"]])
        image, mask = image.to(device), batch["mask"].to(device).unsqueeze(1)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = plain_rounds(model, image, mask, case.clicks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return work


def plain_rounds(model: nn.Module, image: Tensor, mask: Tensor, clicks: int) -> Tensor:
    """Loss over click rounds: each adds a click and sees the mask before, upscaled every time."""
    embedding = model.image_encoder(image)
    low = torch.zeros(len(image), 1, *3 * [SIDE // 4], device=image.device)
    answer, coords, labels, total = torch.zeros_like(image), [], [], 0.0
    for _ in range(clicks):
        click = [
            plain_click(found[0] > 0, truth[0] > 0)
            for found, truth in zip(answer, mask, strict=True)
        ]
        coords.append(torch.stack([place for place, _ in click])[:, None].to(image))
        labels.append(torch.tensor([[label] for _, label in click], device=image.device))
        points = torch.cat(coords, dim=1), torch.cat(labels, dim=1)
        sparse, dense = model.prompt_encoder(points=points, boxes=None, masks=low)
        low, _ = model.mask_decoder(
            image_embeddings=embedding, image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
        )  # fmt: skip
        answer = F.interpolate(low, size=image.shape[-3:], mode="trilinear", align_corners=False)
        total = total + plain_loss(answer.float(), mask.float())
    return total


def plain_click(found: Tensor, truth: Tensor) -> tuple[Tensor, int]:
    """A wrong voxel by argwhere, as coordinates, and whether it is in the object."""
    places = torch.argwhere(found != truth)
    place = places[torch.randint(len(places), (1,)).item()]
    return place, int(truth[tuple(place)].item())


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice with squares in the denominator and cross-entropy, sample by sample."""
    probability, axes = torch.sigmoid(logits), (1, 2, 3, 4)
    overlap = (probability * target).sum(axes)
    size = (probability**2).sum(axes) + (target**2).sum(axes)
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return dice.mean() + F.binary_cross_entropy_with_logits(logits, target)


def dtype_of(name: str) -> torch.dtype | None:
    return None if name == "float32" else getattr(torch, name)


def compare(case: Case, options: argparse.Namespace) -> Row:
    """The row of one case."""
    device = torch.device(options.device)
    works = our_work(case, device), plain_work(case, device)
    pairs = harness.paired_seconds(*works, rounds=options.rounds, device=device)
    return harness.compared(Row(str(case), case.goal), pairs, case.batch, "crops/s")


def main() -> None:
    options = harness.device_parser(__doc__).parse_args()
    title = "SAM-Med3D vit_b_ori, training"
    harness.run_rows(title, options, compare, harness.Cases(ON_CPU, ON_GPU, QUICK))


if __name__ == "__main__":
    main()
