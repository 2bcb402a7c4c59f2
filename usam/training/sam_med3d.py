"""SAM-Med3D's half of u-sam.py: volumes and clicks where the other half has slices and labels.

u-sam.py calls `run_volumes` for --model sam-med3d and lends it the epoch loop. This file alone,
beside u-sam.py, sees both `dataset` and `usam`, and the flags.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from dataset import VolumeStore, build_volumes, open_volumes
from dataset.crops import normalise
from usam.evaluation import clicks as evaluation
from usam.models.sam_med3d import SamMed3d
from usam.models.size import count_parameters, multiply_accumulates
from usam.prediction import volumes
from usam.runtime import processes
from usam.runtime.loaders import evaluation_loader
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.training import checkpoint
from usam.training import clicks as clicks3d
from usam.training.job import Job, Summary, Watch
from usam.weights.sam_med3d import load_or_initialize

Saved = dict[str, Any] | None
Train = Callable[[Namespace, Precision, Job, Saved], None]


def run_volumes(args: Namespace, precision: Precision, saved: Saved, train: Train) -> None:
    """Training with `train`, evaluation or prediction, as the flags say."""
    checkpoint.seed_generators(args.seed)
    if args.predict:
        volumes.predict(args, precision, saved)
        return
    model = load_or_initialize(args, saved)
    model.to(precision.device)
    with processes.main_process_first():
        store = open_volumes(args.dataset, args.data_root)
    for line in store.dropped:
        say(f"left out: {line}")
    if args.eval:
        evaluation.evaluate(args, precision, saved)
    else:
        if saved and args.classes is None:
            args.classes = saved["data"].get("trained_classes")
        train(args, precision, volumes_job(args, precision, model, store), saved)


# ------------------------------------------------------------------ training


def volumes_job(args: Namespace, precision: Precision, model: SamMed3d, store: VolumeStore) -> Job:
    """SAM-Med3D's training on the objects of `store`, with held-out ones to choose the best by."""
    train, val = (objects_of(args, split, model, store) for split in ("train", "val"))
    parts = {name: list(part.parameters()) for name, part in model.named_children()}
    arithmetic = multiply_accumulates(model.image_encoder, 1, 1, *3 * [model.side]) / 1e9
    say(f"{count_parameters(parts)}; {arithmetic:.1f} G multiply-accumulates to encode a crop")
    say(f"{args.dataset}: objects of {len(train.case_ids)} "
        f"cases to train on, {len(val)} objects of {len(val.case_ids)} to validate on")  # fmt: skip
    if not len(val):
        say("too few training cases to set some aside: best.pth holds the last epoch")
    how = {"num_workers": args.num_workers, "batch_size": args.batch_size}
    validation = evaluation_loader(val, **how)

    def validate(watch: Watch) -> Summary:
        return evaluation.click_dice(
            model, watch(validation), normalise=normalise, precision=precision, seed=args.seed
        )

    return Job(
        model=model,
        groups=model.parameter_groups(args.lr_vit, args.lr),
        data=train,
        step=clicks3d.click_step(normalise, precision.device, args.rounds),
        validate=validate if len(val) else None,
        shown=lambda summary: summary["dice"],
        info=train.info | model.config | clicks3d.CHOICES | {"trained_classes": args.classes},
        decay_at=clicks3d.DECAY_AT,
    )


def objects_of(args: Namespace, split: str, model: SamMed3d, store: VolumeStore) -> Any:
    """The objects of a split, of the classes that --classes names."""
    return build_volumes(
        args.dataset, split, side=model.side, seed=args.seed, val_fraction=args.val_fraction,
        only=args.classes, flips=not args.no_flips, store=store,
    )  # fmt: skip
