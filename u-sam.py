"""Train, evaluate and resume U-SAM on CT slices, or SAM-Med3D on volumes; predict with both.

    python u-sam.py --epochs 100 --batch_size 24 --dataset rectum
    torchrun --nproc_per_node=8 u-sam.py --num_workers 4 --epochs 100 --batch_size 24
    python u-sam.py --dataset rectum --eval --resume chkpt/best.pth
    python u-sam.py --predict SCAN.nii.gz --resume chkpt/best.pth --output_dir predictions
    python u-sam.py --dataset phantom --sam_weight none --img_size 112    (no data, no weights)
    python u-sam.py --model sam-med3d --dataset volumes --data_root ROOT
    python u-sam.py --model sam-med3d --predict SCAN.nii.gz --resume chkpt/best.pth --point 90 81 40

Reads top to bottom: flags, what a run is made of, evaluation, prediction; training.py has the
epochs. Exit codes: 0 done, 2 bad input, 75 stopped by a signal and saved, to go on with
--resume auto, 130 interrupted.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from typing import Any

from dataset import SliceDataset, build_dataset
from dataset.transforms import AUGMENTATIONS
from usam.cli.choices import MIXED
from usam.cli.parser import fill_defaults, parse_flags
from usam.cli.recipes import chosen_loss
from usam.cli.values import jitter_pixels
from usam.evaluation.merge import merge
from usam.evaluation.pixels import PROMPT_SOURCES, count_pixels
from usam.evaluation.slices import evaluate
from usam.models.size import count_parameters, multiply_accumulates
from usam.models.usam import USam, build_usam
from usam.prediction import slices
from usam.runtime import peers, processes, samplers
from usam.runtime.loaders import evaluation_loader
from usam.runtime.precision import Precision, select_precision
from usam.runtime.processes import say
from usam.runtime.signals import StopRequest
from usam.training import checkpoint, engine, resume
from usam.training.job import Job, Summary, Watch
from usam.training.run import train
from usam.training.sam_med3d import Train, run_volumes
from usam.weights import sam as sam_file
from usam.weights import usam as weights
from usam.weights.inference import averaged
from usam.weights.lora import load_lora, save_lora
from usam.weights.small_checkpoint import base_of_run

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def main(args: Namespace) -> None:
    """One run: device, checkpoint and flags, then what the model does with them."""
    device = processes.start(args.device, num_processes=args.world_size, dist_url=args.dist_url)
    args.resume, saved = resume.choose(
        args.resume, args.output_dir, args.sam_weight, more=bool(args.ensemble)
    )
    fill_defaults(args, saved)
    if args.merge:
        merge(args)
        return
    if saved and (args.eval or args.predict):
        saved = averaged(saved)
    precision = select_precision(args.amp, device)
    say(f"{processes.world_size()} process(es) on {device.type}, {precision}")
    run = run_volumes if args.model == "sam-med3d" else run_slices
    stopping = nullcontext() if args.eval or args.predict else StopRequest()
    with peers.watched(), stopping as stop:
        run(args, precision, saved, partial(train, stop=stop))


def run_slices(
    args: Namespace, precision: Precision, saved: dict[str, Any] | None, train: Train
) -> None:
    """U-SAM on slices: data, model, then training or evaluation; or prediction, without data."""
    if args.export_lora:
        export_lora(args, saved)
        return
    if args.predict:
        slices.predict(args, precision, saved)
        return
    if args.eval:
        evaluate(args, precision, saved)
        return
    with processes.main_process_first():
        data = {split: load_split(args, split) for split in ("train", "val")}
    classes = data["train"].classes
    if saved and len(saved["data"]["classes"]) != len(classes):
        raise ValueError(
            f"{args.resume} was trained on {len(saved['data']['classes'])} classes, "
            f"--dataset {args.dataset} has {len(classes)}"
        )
    checkpoint.seed_generators(args.seed)
    if saved:
        model = weights.load_usam(saved, args.resume, args.sam_weight, merge=False)
        say(f"{args.resume}: {args.sam_model} at {args.img_size} pixels")
    else:
        model = fresh_model(args, data["train"].info)
    model.to(precision.device)
    job = slices_job(args, precision, model, data, described=described(args, saved))
    say_what_is_trained(args, job, data)
    train(args, precision, job, saved)


def fresh_model(args: Namespace, data: dict[str, Any]) -> USam:
    """The model the flags describe for `data`, from SAM's weights and, if given, a LoRA file."""
    classes = len(data["classes"])
    model = build_usam(args.sam_model, classes, args.img_size, args.adapter, args.tuning)
    with processes.main_process_first():
        start = {"init": args.init, "fold": args.fold, "data": data}
        say(weights.initialize(model, args.sam_model, args.sam_weight, **start))
    if args.lora_weight:
        say(load_lora(model, args.lora_weight))
    if args.tuning != "full" and args.sam_weight == "none" and not args.init:
        say(f"warning: --tuning {args.tuning} leaves SAM's encoder as it is, and --sam_weight none "
            "makes it random")  # fmt: skip
    return model


def described(args: Namespace, saved: dict[str, Any] | None) -> dict[str, Any]:
    """What a training run's checkpoints say of the model, beside what they say of the data."""
    with_file = args.small_checkpoints and not (saved or args.init)
    sam_weights = sam_file.find(args.sam_model, args.sam_weight) if with_file else None
    base = base_of_run(
        saved, small=args.small_checkpoints, tuning=args.tuning, sam_weights=sam_weights
    )
    facts = {name: getattr(args, name) for name in ("prompt_mode", "adapter", "tuning")}
    return facts | ({"base": base} if base else {})


def export_lora(args: Namespace, saved: dict[str, Any]) -> None:
    """Write the LoRA of `--resume`, averaged where it holds an average, for other programs."""
    if processes.is_main():
        with_decoder = args.adapter == "none"
        say(save_lora(averaged(saved)["model"], args.export_lora, with_decoder=with_decoder))


def load_split(args: Namespace, split: str) -> SliceDataset:
    """One split of the data set that the flags name."""
    return build_dataset(
        args.dataset, split, data_root=args.data_root, img_size=args.img_size,
        seed=args.seed, val_fraction=args.val_fraction, empty=args.empty, input_mode=args.input,
        fold=args.fold,
    )  # fmt: skip


# ------------------------------------------------------------------ training


def slices_job(
    args: Namespace,
    precision: Precision,
    model: USam,
    data: dict[str, SliceDataset],
    *,
    described: dict[str, Any],
) -> Job:
    """U-SAM's training on `data`, its "train" and "val" splits; described: see `described`."""
    how = {"num_workers": args.num_workers, "batch_size": args.batch_size}
    validation, classes = evaluation_loader(data["val"], **how), data["val"].classes
    mode = 0 if args.prompt_mode == MIXED else args.prompt_mode

    def validate(watch: Watch) -> Summary:
        counts = count_pixels(model, watch(validation), prompt_mode=mode, precision=precision)
        return counts.summary(classes) | {"prompts": PROMPT_SOURCES[mode]}

    def shown(summary: Summary) -> dict[str, float | None]:
        dice = dict(list(summary["dice"].items())[1:])
        few = dice if len(dice) < 6 else dict(list(dice.items())[:4])
        mean = "mean" if few is dice else f"mean of all {len(dice)} classes"
        return few | {mean: summary["mean_dice"]}

    pixels, device = data["train"].class_pixels, precision.device
    loss = chosen_loss(args.class_weights, pixels, device)
    return Job(
        model=model,
        groups=model.parameter_groups(args.lr, args.lr_vit, args.lr_backbone),
        data=data["train"],
        step=engine.segmentation_step(
            AUGMENTATIONS[args.augment],
            args.prompt_mode,
            device,
            loss=loss,
            prompt_jitter=jitter_pixels(args.prompt_jitter, args.img_size),
        ),
        validate=validate if len(data["val"]) else None,
        shown=shown,
        info=data["train"].info | described,
        balanced=samplers.ClassBalancedSampling(args.foreground_share, data["train"].by_class),
    )


def say_what_is_trained(args: Namespace, job: Job, data: dict) -> None:
    """Print the sizes of what is about to be trained, and what the best is chosen by."""
    image = 1, 3, args.img_size, args.img_size
    say(
        f"U-SAM {args.sam_model} at {args.img_size} pixels, --adapter {args.adapter} --tuning "
        f"{args.tuning}: {count_parameters(job.model.parts())}; "
        f"{multiply_accumulates(job.model, *image) / 1e9:.2f} G multiply-accumulates a slice (the "
        "paper's GFLOPs)"
    )
    say(
        f"{args.dataset}: {len(data['train'])} training slices, {len(data['val'])} to validate on; "
        f"{args.input} input, {args.recipe} recipe"
    )
    if not len(data["val"]):
        say("too few training cases to set some aside: best.pth holds the last epoch")
    elif args.val_fraction == 0 and args.fold is None:
        say("--val_fraction 0: best.pth is chosen on the test cases, as published")
    if args.batch_size == 1:
        say("warning: BatchNorm learns little from --batch_size 1; 2 or more is better")


if __name__ == "__main__":
    flags = parse_flags()
    try:
        main(flags)
    except (ValueError, OSError) as error:
        # A loader's process sends its whole traceback, which ends in the line that matters.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        print(f"u-sam.py: error: {reason}", file=sys.stderr, flush=True)
        peers.end(BAD_INPUT)
    except KeyboardInterrupt:
        print("u-sam.py: interrupted", file=sys.stderr, flush=True)
        peers.end(INTERRUPTED)
    except Exception as error:
        peers.end_by(error)
    finally:
        processes.stop()
