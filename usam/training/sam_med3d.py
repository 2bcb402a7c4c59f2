"""SAM-Med3D's half of u-sam.py: volumes and clicks where the other half has slices and labels.

u-sam.py calls `run_volumes` for --model sam-med3d and lends it the epoch loop. This file alone,
beside u-sam.py, sees both `dataset` and `usam`, and the flags.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import VolumeStore, build_volumes, open_volumes
from dataset.crops import click_origin, crop_reader, normalise
from dataset.scans.slices import find_scans, output_names
from dataset.scans.upright import apply_window
from dataset.scans.volumes import ScanVolume, read_label_volume, read_volume
from usam.evaluation import clicks as evaluation
from usam.models.sam_med3d import SamMed3d, build_sam_med3d
from usam.models.size import count_parameters, multiply_accumulates
from usam.prediction import volumes as predict3d
from usam.prediction.output import (
    class_colors,
    class_volumes,
    count_voxels,
    montage_slices,
    save_montage,
)
from usam.prediction.windows import MAX_WINDOWS, Encoder
from usam.runtime import processes
from usam.runtime.loaders import evaluation_loader
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.training import checkpoint
from usam.training import clicks as clicks3d
from usam.training.job import Job, Summary, Watch
from usam.weights import sam_med3d as weights3d

Saved = dict[str, Any] | None
Train = Callable[[Namespace, Precision, Job, Saved], None]


def run_volumes(args: Namespace, precision: Precision, saved: Saved, train: Train) -> None:
    """Training with `train`, evaluation or prediction, as the flags say."""
    checkpoint.seed_generators(args.seed)
    model = starting_model(args, saved)
    model.to(precision.device)
    if args.predict:
        predict_volumes(args, precision, model)
        return
    with processes.main_process_first():
        store = open_volumes(args.dataset, args.data_root)
    for line in store.dropped:
        say(f"left out: {line}")
    if args.eval:
        evaluation.evaluate(args, precision, model, store)
    else:
        if saved and args.classes is None:
            args.classes = saved["data"].get("trained_classes")
        train(args, precision, volumes_job(args, precision, model, store), saved)


def starting_model(args: Namespace, saved: Saved) -> SamMed3d:
    """The network with the weights of --resume, else of --sam_weight; says which."""
    if saved:
        state, num_points = saved["model"], saved["data"]["num_point_embeddings"]
        source = args.resume
    else:
        source, state, num_points = weights3d.starting_weights(args.sam_model, args.sam_weight)
    model = build_sam_med3d(args.sam_model, args.rel_pos, num_points)
    if saved:
        checkpoint.load_model_state(model, state, args.resume)
    elif state is not None:
        weights3d.load_sam_med3d_weights(model, state)
    elif args.eval or args.predict:
        raise ValueError("random weights know nothing: name --resume or a --sam_weight file")
    size = f"SAM-Med3D {args.sam_model}, {model.side} voxels a side, {args.rel_pos} positions"
    say(f"{size}: {source or 'random weights'}")
    return model


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


def encoder_of(image: np.ndarray, model: SamMed3d, precision: Precision) -> Encoder:
    """What encodes windows of a volume (X, Y, Z) at 1.5 mm, cut and scaled as in training."""
    return Encoder(model, image.shape, read=crop_reader(image), precision=precision)


# ---------------------------------------------------------------- prediction


def predict_volumes(args: Namespace, precision: Precision, model: SamMed3d) -> None:
    """Segment the scans of --predict, each process its share; raises ValueError if one failed."""
    scans = find_scans(args.predict)
    if len(scans) > 1 and not args.prompts:
        raise ValueError(f"--point and --box mark one scan, --predict names {len(scans)}; "
                         "use --prompts FILE")  # fmt: skip
    if len(scans) > 1 and args.init_mask:
        raise ValueError(f"--init_mask is for one scan, --predict names {len(scans)}")
    model.eval()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    named = list(zip(scans, output_names(scans), strict=True))
    failures = 0
    for path, name in named[processes.rank() :: processes.world_size()]:
        try:
            print(predict_volume(args, precision, model, path, name), flush=True)
        except (ValueError, OSError) as error:
            if len(scans) == 1:
                raise
            failures += 1
            print(f"u-sam.py: error: {error}", file=sys.stderr, flush=True)
    failures = int(processes.reduce_sum(torch.tensor(failures)))
    if failures:
        raise ValueError(f"{failures} of {len(scans)} scans were not segmented, see above")


def predict_volume(
    args: Namespace, precision: Precision, model: SamMed3d, path: Path, name: str
) -> str:
    """Write NAME_seg.nii.gz and NAME_seg.json of one scan; lines on what was found."""
    if args.prompts:
        prompts = predict3d.read_prompts3d(args.prompts, path.name)
    else:
        prompts = predict3d.prompts3d_from_flags(args.point, args.box, mm=args.mm)
    scan = read_volume(path, args.channel)
    known = read_label_volume(args.init_mask, scan.grid) if args.init_mask else None
    label, rows = predict3d.segment(
        encoder_of(scan.image, model, precision), prompts,
        to_voxels=partial(scan.clicks, mm=prompts.mm), place=click_origin, init_mask=known,
    )  # fmt: skip
    target = args.output_dir / f"{name}_seg.nii.gz"
    scan.save(target, label)
    rows = with_volumes(rows, label, scan)
    facts = {
        "input": path.name, "checkpoint": str(args.resume or args.sam_weight),
        "model": f"sam-med3d {args.sam_model}",
    }  # fmt: skip
    predict3d.write_rows(args.output_dir / f"{name}_seg.json", rows, facts)
    if args.overlay:
        draw(args.output_dir / f"{name}_overlay.png", scan, label, rows)
    told = [f"{row['name']} {row['volume_ml']:.1f} ml, {row['points']} points, "
            f"{row['windows']} windows" for row in rows]  # fmt: skip
    for row in rows:
        if "clicked" in row.get("box", ""):
            told.append(f"{row['name']}: this model knows no boxes; {row['box']}")
        if row["stopped_early"]:
            told.append(f"{row['name']}: goes on after {MAX_WINDOWS} windows; "
                        "click again where it ends")  # fmt: skip
    return f"{target}: " + "\n  ".join(told)


def with_volumes(
    rows: list[dict[str, Any]], label: np.ndarray, scan: ScanVolume
) -> list[dict[str, Any]]:
    """The objects' rows with their voxels in the scan and their volumes in ml."""
    labels = [row["label"] for row in rows]
    voxels = count_voxels(scan.restore(label), 256)[labels].tolist()
    names = [row["name"] for row in rows]
    sizes = class_volumes(voxels, names, [""] * len(rows), scan.grid.header.voxel_ml)
    return [
        row | {"voxels": size["voxels"], "volume_ml": size["volume_ml"]}
        for row, size in zip(rows, sizes, strict=True)
    ]


def draw(path: Path, scan: ScanVolume, label: np.ndarray, rows: list[dict[str, Any]]) -> None:
    """Axial slices through the objects as one PNG, upright, at 1.5 mm."""
    slices, labels = (  # RAS (x, y, z) -> rows to posterior, columns to the patient's left
        volume[::-1, ::-1].transpose(2, 1, 0) for volume in (scan.image, label)
    )
    numbers = montage_slices(np.count_nonzero(labels, axis=(1, 2)))
    shown = dict(zip(numbers, apply_window(slices[numbers], "percentile"), strict=True))
    names = {row["label"]: row["name"] for row in rows}
    classes = [names.get(number, "") for number in range(max(names) + 1)]
    save_montage(
        path, numbers, shown.__getitem__, labels, classes=classes,
        colors=class_colors(None, len(classes)), title=path.name.removesuffix("_overlay.png"),
    )  # fmt: skip
