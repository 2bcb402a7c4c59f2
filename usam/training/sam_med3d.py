"""SAM-Med3D's training: its objects in volumes, model, click rounds and validation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dataset import VolumeDataset, VolumeStore, build_volumes, open_volumes
from dataset.crops import normalise
from dataset.text import counted
from usam.evaluation.clicks import click_dice, crops_to_device
from usam.models.sam_med3d import THRESHOLD, SamMed3d
from usam.models.size import count_parameters, multiply_accumulates
from usam.runtime import processes
from usam.runtime.loaders import Batch, evaluation_loader
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.training.cases import case_record, check_store, describe_validation, held_out_of
from usam.training.checkpoint import seed_generators
from usam.training.losses import dice_bce_loss
from usam.weights.sam_med3d import load_or_initialize

CHOICES = {  # where published training and inference disagree; a checkpoint keeps them
    "prompt_mode": "clicks",
    "clicks": "accumulate",
    "threshold": THRESHOLD,
}


class SamMed3dTask:
    """Training SAM-Med3D on objects of volumes; attributes and methods as USamTask's."""

    decay_at = (0.6, 0.9)  # of the training: epochs 120 and 180 of 200, as published
    balanced = None

    def __init__(self, args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> None:
        self.args, self.precision = args, precision
        seed_generators(args.seed)
        self.model = load_or_initialize(args, saved).to(precision.device)
        with processes.main_process_first():
            store = open_volumes(args.dataset, args.data_root)
        for line in store.dropped:
            say(f"left out: {line}")
        if saved and args.classes is None:
            args.classes = saved["data"].get("trained_classes")
        check_store(store)
        held_out = held_out_of(args, saved, store)
        self.train_data = load_split(args, "train", self.model, store, held_out)
        self.val_data = load_split(args, "val", self.model, store, held_out)
        loading = {"num_workers": args.num_workers, "batch_size": args.batch_size}
        self.val_loader = evaluation_loader(self.val_data, **loading) if self.val_data else None
        self.info = self.train_data.info | self.model.config | CHOICES
        self.info |= {"trained_classes": args.classes}
        self.info |= case_record(args, saved, self.train_data, self.val_data)
        self.step = ClickStep(precision.device, args.rounds)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups with the learning rates of the flags."""
        return self.model.parameter_groups(self.args.lr_vit, self.args.lr)

    def validate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Dice after 1, 3, 5 and 10 clicks on the crops of `batches`, of all processes."""
        return click_dice(
            self.model, batches, normalise=normalise, precision=self.precision, seed=self.args.seed
        )

    def scores_to_print(self, summary: dict[str, Any]) -> dict[str, float | None]:
        """The scores of `validate` for an epoch's log line, by name."""
        return summary["dice"]

    def describe(self) -> None:
        """Print the sizes of model and data, and how the best epoch is chosen."""
        parts = {name: list(part.parameters()) for name, part in self.model.named_children()}
        volume = 1, 1, *3 * [self.model.side]
        arithmetic = multiply_accumulates(self.model.image_encoder, *volume) / 1e9
        say(f"{count_parameters(parts)}; {arithmetic:.1f} G multiply-accumulates to encode a crop")
        train, val = self.train_data, self.val_data
        train_cases, val_cases = (counted(len(data.case_ids), "case") for data in (train, val))
        say(f"{self.args.dataset}: objects of {train_cases} to train on, "
            f"{counted(len(val), 'object')} of {val_cases} to validate on")  # fmt: skip
        describe_validation(self.args, val)


@dataclass(frozen=True)
class ClickStep:
    """SAM-Med3D's training step: rounds of simulated clicks inside the model's forward, then loss.

    The clicks are drawn by `usam.models.prompts.next_clicks`, `rounds` of them for each object.
    """

    device: torch.device
    rounds: int

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """The batch's loss; all randomness comes from `generator`."""
        volume, mask = crops_to_device(batch, normalise, self.device)
        logits = model(volume, mask, generator, num_rounds=self.rounds)
        return rounds_loss(getattr(model, "module", model), logits, mask)


def rounds_loss(model: SamMed3d, logits: Tensor, mask: Tensor) -> Tensor:
    """Dice and cross-entropy at full size, summed over the rounds as published.

    logits (N, rounds, s, s, s) of low resolution; mask (N, 1, S, S, S). One round is upscaled at a
    time and again in the backward pass, so that full size is never held for all of them.
    """

    def one_round(answer: Tensor) -> Tensor:
        return dice_bce_loss(model.upscale(answer.float()), mask)

    answers = logits.split(1, dim=1)
    losses = [
        checkpoint(one_round, answer, use_reentrant=False, preserve_rng_state=False)
        for answer in answers
    ]
    return torch.stack(losses).sum()


def load_split(
    args: Namespace, split: str, model: SamMed3d, store: VolumeStore, held_out: dict[str, Any]
) -> VolumeDataset:
    """The objects of a split, of the classes that --classes names; see `held_out_of`."""
    return build_volumes(
        args.dataset, split, side=model.side, seed=args.seed, val_fraction=args.val_fraction,
        only=args.classes, flips=not args.no_flips, store=store, **held_out,
    )  # fmt: skip
