"""An epoch with SAM's embeddings kept on disk, against one that computes them.

    python -m benchmarks.cached [--quick] [--device cuda] [--threads N] [--data_root STORE]

vit_t with LiteMedSAM's weights, --adapter none --tuning decoder: training on slices of STORE (drawn
ones without it) and validation on a tenth as many, loaders included, after the epoch that fills the
cache. --quick takes random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import harness
from benchmarks.data import write_slices
from benchmarks.harness import Row
from benchmarks.train_step import fresh_state, precision_of
from dataset.slices import SliceDataset
from dataset.store.slices import SliceStore
from dataset.transforms import unchanged
from usam.evaluation.pixels import count_pixels
from usam.models.sam_encoder import PROMPT_WIDTH
from usam.models.usam import USam, build_usam
from usam.runtime.embeddings import EmbeddingCache, encoder_digest
from usam.runtime.loaders import evaluation_loader, training_loader
from usam.training import engine
from usam.training.optimizer import build_optimizer
from usam.training.usam import SegmentationStep
from usam.weights import sam


class Case(NamedTuple):
    """One comparison: size of the input, batch, slices to train on, precision of both sides."""

    size: int
    batch: int
    images: int
    precision: str
    weights: bool = True
    goal: str = ">= 10x"

    def __str__(self) -> str:
        return f"{self.precision}, {self.size} x {self.size}, batch {self.batch}"


ON_CPU = (Case(128, 8, 40, "float32"), Case(256, 8, 40, "float32"))
ON_GPU = (Case(128, 24, 960, "bfloat16"), Case(256, 24, 960, "bfloat16"))
QUICK = (Case(32, 2, 10, "float32", weights=False),)


def compare(case: Case, options: argparse.Namespace) -> Row:
    """An epoch with the cache, once it is filled, and one without."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.data_root is None:
            write_slices(folder, case.images, side=2 * case.size)
        store = SliceStore(options.data_root or folder / "store")
        model = model_of(case, len(store.classes)).to(device)
        epoch = partial(run_epoch, case, model, store, options.num_workers)
        embed = model.embed
        cells = case.size // model.stride
        cache = EmbeddingCache(
            embed, folder / "cache", shape=(PROMPT_WIDTH, cells, cells), limit=1e12,
            encoder=encoder_digest(model.sam.image_encoder),
        )  # fmt: skip
        pairs = harness.paired_seconds(
            partial(epoch, cache), partial(epoch, embed), rounds=options.rounds, device=device
        )
    row = Row(f"an epoch with cached embeddings, vit_t, {case}", case.goal)
    return harness.compared(row, pairs, case.images, "images/s")


def model_of(case: Case, num_classes: int) -> USam:
    """vit_t for decoder tuning."""
    model = build_usam("vit_t", num_classes, case.size, "none", "decoder")
    if case.weights:
        sam.load_sam_checkpoint(model, sam.find_lite_medsam())
    return model


def run_epoch(case: Case, model: USam, store: SliceStore, num_workers: int, embed: Any) -> None:
    """Train on the first slices of the store's first split, validate on a tenth as many others."""
    device = next(model.parameters()).device
    precision = precision_of(case.precision, device)
    model.embed = embed
    places = [place for split in ("train", "test") for place in store.slices(split)]
    given = {"img_size": case.size, "random_contrast": False}
    trained = SliceDataset(store, places[: case.images], **given)
    others = SliceDataset(store, places[-(case.images // 10) :], **given)
    loading = {"batch_size": case.batch, "num_workers": num_workers}
    optimizer = build_optimizer(model.parameter_groups(1e-4, 1e-5, 1e-5), 1e-4)
    loader = training_loader(trained, seed=0, **loading)
    engine.train_one_epoch(
        model, loader, fresh_state(model, optimizer, precision),
        step=SegmentationStep(device, unchanged), precision=precision,
        recipe=engine.Recipe(seed=0, total_samples=10**9),
    )  # fmt: skip
    count_pixels(model, evaluation_loader(others, **loading), prompt_mode=0, precision=precision)


def main() -> None:
    parser = harness.device_parser(__doc__)
    parser.add_argument("--data_root", type=Path, help="a store of real slices")
    parser.add_argument("--num_workers", type=int, default=2)
    options = parser.parse_args()
    harness.run_rows("Cached embeddings", options, compare, harness.Cases(ON_CPU, ON_GPU, QUICK))


if __name__ == "__main__":
    main()
