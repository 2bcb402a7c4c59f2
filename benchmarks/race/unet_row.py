"""A row of MONAI's U-Nets, trained as a user would: same slices, same loss, AdamW, falling rate."""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.race.rows import BATCH, FORWARD, Run
from benchmarks.race.scores import Labels, predict_labels
from dataset import SliceDataset, build_dataset
from dataset.transforms import AUGMENTATIONS
from usam.evaluation.metrics import rank_score
from usam.evaluation.pixels import count_pixels
from usam.runtime.loaders import evaluation_loader, to_device, training_loader
from usam.runtime.precision import select_precision
from usam.training.engine import step_generator
from usam.training.losses import segmentation_loss

LR, WEIGHT_DECAY, POWER = 1e-3, 1e-4, 0.9


class UNet(nn.Module):
    """A network of MONAI's with the call of ours: model(image) -> logits, without prompts."""

    def __init__(self, network: str, num_classes: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's, about its own imports
            from monai.networks.nets import BasicUNet
            from monai.networks.nets import UNet as ResidualUNet
        self.num_classes = num_classes
        if network == "basic":
            self.net = BasicUNet(2, 1, num_classes)
        else:
            self.net = ResidualUNet(
                2, 1, num_classes, channels=(32, 64, 128, 256), strides=(2, 2, 2), num_res_units=2
            )

    def forward(self, image: Tensor, **no_prompts: None) -> Tensor:
        """image (N, 1, H, W) in [0, 1] -> logits (N, C, H, W)."""
        return self.net(image * 2 - 1)


class UNetRow:
    """A U-Net on a store. train() ends within the time; the best epoch by validation is kept."""

    def __init__(self, run: Run, store: Path, started: float) -> None:
        self.run, self.store, self.started = run, store, started
        network, augmentation = run.row.flags
        self.augment = AUGMENTATIONS[augmentation]
        self.precision = select_precision("auto", torch.device("cpu"))
        self.train_data, self.val_data = self.data("train"), self.data("val")
        torch.manual_seed(run.seed)
        self.model = UNet(network, len(self.train_data.classes))
        self.best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})
        self.to_validate, self.is_measured = 0.0, False  # seconds

    def data(self, split: str) -> SliceDataset:
        """The slices of a split."""
        return build_dataset(
            "store", split, data_root=self.store, img_size=self.run.img_size, seed=self.run.seed
        )

    def train(self) -> dict[str, Any]:
        """Train until the time is up, validations included; what was done."""
        limit, steps, epoch = self.run.minutes * 60, 0, 0
        optimizer = torch.optim.AdamW(self.model.parameters(), LR, weight_decay=WEIGHT_DECAY)
        loader = training_loader(
            self.train_data, batch_size=BATCH, num_workers=0, seed=self.run.seed
        )
        ready = self.elapsed()
        while self.elapsed() + self.to_validate < limit:
            self.model.train()
            loader.batch_sampler.epoch = epoch
            for number, batch in enumerate(loader):
                end = limit - self.to_validate
                if self.elapsed() >= end:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = LR * max(1 - self.elapsed() / end, 0) ** POWER
                generator = step_generator(self.run.seed, epoch, number, 0)
                image, mask = self.augment(*to_device(batch, self.precision.device), generator)
                with self.precision.autocast():
                    loss = segmentation_loss(self.model(image), mask)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                steps += 1
                if not self.is_measured:
                    share = FORWARD * len(self.val_data) / (steps * BATCH)
                    self.to_validate = (self.elapsed() - ready) * share
            epoch += 1
            self.validate(epoch - 1)
        if not steps:
            raise RuntimeError(f"no step within {limit:.0f} s; give more --minutes")
        return {
            "seconds": round(self.elapsed(), 1), "steps": steps, "epochs": epoch,
            "batch_size": BATCH, "img_size": self.run.img_size, "best_epoch": self.best[1],
        }  # fmt: skip

    def validate(self, epoch: int) -> None:
        """Keep the weights if they are the best so far."""
        start = time.monotonic()
        loader = evaluation_loader(self.val_data, num_workers=0, batch_size=16)
        counts = count_pixels(self.model, loader, prompt_mode=0, precision=self.precision)
        dice = rank_score(counts.summary(self.val_data.classes)["mean_dice"])
        if dice > self.best[0]:
            self.best = dice, epoch, copy.deepcopy(self.model.state_dict())
        self.to_validate, self.is_measured = time.monotonic() - start, True
        print(f"epoch {epoch}: validation Dice {dice:.4f}, {self.elapsed():.0f} s", flush=True)

    def predict(self, split: str) -> Labels:
        """The labels of the best epoch."""
        if self.best[2]:
            self.model.load_state_dict(self.best[2])
        return predict_labels(self.model, self.data(split), self.precision)

    def elapsed(self) -> float:
        """Seconds since the row's process began."""
        return time.monotonic() - self.started
