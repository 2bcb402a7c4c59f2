"""nnU-Net's own trainer, stopped by time; read by nnunetv2 itself, in its own environment."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class OutOfTimeError(Exception):
    """The end of the training."""


class RaceTrainer(nnUNetTrainer):
    """As published, but for what a limit in time asks for.

    The rate falls by nnU-Net's polynomial over the time instead of 1000 epochs; epochs are a fifth
    as long; training ends at RACE_DEADLINE (seconds since 1970), RACE_SECONDS after its start, with
    the final checkpoint; there is no validation on whole scans after it.
    """

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device
    ) -> None:  # the names that nnU-Net looks up
        super().__init__(plans, configuration, fold, dataset_json, device)
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # nnU-Net takes all of the machine
        self.num_epochs = 100_000
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 50, 10
        self.deadline = float(os.environ.get("RACE_DEADLINE", 0))
        self.seconds = float(os.environ.get("RACE_SECONDS", 1))
        self.steps = 0

    def train_step(self, batch: dict) -> dict:
        """A step at the rate of this time; raises OutOfTimeError at the end."""
        left = (self.deadline - time.time()) / self.seconds
        if left <= 0:
            raise OutOfTimeError
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * left**0.9
        self.steps += 1
        return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step on patches of the validation cases, within the time."""
        if time.time() >= self.deadline:
            raise OutOfTimeError
        return super().validation_step(batch)

    def run_training(self) -> None:
        """Train until the time is up, then save."""
        try:
            super().run_training()
        except OutOfTimeError:
            folder = Path(self.output_folder)
            self.save_checkpoint(str(folder / "checkpoint_final.pth"))
            facts = {"steps": self.steps, "epochs": self.current_epoch}
            facts |= {"batch_size": self.configuration_manager.batch_size,
                      "patch": list(self.configuration_manager.patch_size)}  # fmt: skip
            (folder / "race.json").write_text(json.dumps(facts), encoding="utf-8")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Left out: the race scores all rows in its own way."""
