"""The command line of u-sam.py: every flag, its check and its one-line help.

Only u-sam.py calls this and sees what comes back; the rest of the package takes plain arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from usam.flag_values import (
    class_weights,
    count,
    decay,
    jitter,
    non_negative,
    positive,
    prompt_mode,
    share,
)
from usam.flags_evaluation import add_evaluation_flags, check_evaluation_flags
from usam.model import ADAPTERS, TUNINGS
from usam.model3d import SAM_MED3D_MODELS
from usam.prompts import MIXED, PROMPT_MODES
from usam.recipes import RECIPES
from usam.resume import AUTO
from usam.sam_vit import SAM_MODELS

# What a flag left out means, by --model. A flag of this list that a model lacks is not for it.
# A training run that goes on from --resume takes the values it had there instead.
OF_ALL = {
    "val_fraction": 0.1, "warmup": False, "clip_max_norm": 0.0, "ema": 0.0, "patience": 0,
    "seed": 202307,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "u-sam": {
        **OF_ALL,
        "dataset": "rectum",
        "sam_model": "vit_b",
        "fold": None,
        "adapter": "u",
        "tuning": "full",
        "small_checkpoints": False,
        "img_size": 224,
        "input": "2d",
        "empty": None,  # as the data set has it
        "prompt_mode": 0,
        "prompt_jitter": "0",
        "recipe": "published",
        **RECIPES["published"],
        "epochs": 100,
        "batch_size": 24,
        "accumulation_steps": 1,
        "lr": 1e-3,
        "lr_vit": 1e-4,
        "lr_backbone": 1e-4,
        "weight_decay": 1e-4,
    },
    "sam-med3d": {
        **OF_ALL,
        "dataset": "phantom3d",
        "sam_model": "vit_b_ori",
        "rel_pos": "published",
        "epochs": 200,
        "batch_size": 12,
        "accumulation_steps": 20,
        "lr": 8e-5,
        "lr_vit": 8e-4,
        "weight_decay": 0.1,
        "rounds": 11,
        "no_flips": False,
        "clicks": "random",
    },
}
ONLY_FOR = {  # flags without a default that one model has
    "u-sam": (
        "init", "lora_weight", "export_lora", "ensemble", "spacing", "prompt_sweep", "tta", "merge",
        "window", "slice", "probabilities", "largest_component",
    ),
    "sam-med3d": ("classes", "init_mask"),
}  # fmt: skip
DATASETS_3D = ("volumes", "phantom3d")
BOX_LENGTH = {"u-sam": 4, "sam-med3d": 6}
DESCRIBED = (  # as a checkpoint's is
    "sam_model", "adapter", "tuning", "img_size", "input", "prompt_mode", "rel_pos",
)  # fmt: skip
NOT_DECISIVE = (  # for a training that goes on
    "epochs", "patience", "batch_size", "recipe", "clicks", "small_checkpoints",
)  # fmt: skip
# What is described thus in checkpoints older than the flag.
SINCE = {"adapter": "u", "tuning": "full", "input": "2d"}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, not below a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def parse_flags(datasets: Iterable[str], arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked one by one; those left at None take a checkpoint's value or a default.

    datasets: the names --dataset may take. Exits with one line and code 2 on a bad flag.
    """
    parser = Parser(
        description="Tune SAM to segment CT slices.",
        epilog="Exit codes: 0 done; 2 bad input; 75 stopped by SIGTERM or SIGUSR1, all saved.",
    )
    data = parser.add_argument_group("data").add_argument
    data("--dataset", choices=sorted(datasets), help="what to work on (rectum; phantom3d)")
    data("--data_root", nargs="+", type=Path, metavar="PATH",
        help="its folder (data/CARE, data/WORD, data/phantom); volumes: or several")  # fmt: skip
    data("--classes", nargs="+", metavar="NAME", help="sam-med3d: only these classes (all)")
    data("--no_flips", action="store_true", default=None, help="sam-med3d: train without flips")
    data(
        "--val_fraction",
        type=float,
        metavar="F",
        help="share of the training cases to validate on; 0: on the test cases (0.1)",
    )
    data("--fold", type=count, metavar="K",
        help="validate on fold K, from 0, of a store prepared with --folds")  # fmt: skip
    data("--empty", type=share, metavar="keep|drop|N%",
        help="training slices without foreground (keep; word: drop)")  # fmt: skip
    data("--num_workers", type=count, default=2, help="loader processes for each process (2)")
    model = parser.add_argument_group("model").add_argument
    model("--model", choices=list(DEFAULTS), help="slices or volumes (u-sam, or --resume's)")
    sizes = list(dict.fromkeys([*SAM_MODELS, *SAM_MED3D_MODELS]))
    model("--sam_model", choices=sizes, help="the encoder's size (vit_b; vit_b_ori)")
    model("--sam_weight", metavar="PATH|none", help="weights to start from (in weight/)")
    model("--adapter", choices=ADAPTERS,
        help="SAM with the U-shaped adapter, or none: its own patches and decoder (u)")  # fmt: skip
    model("--tuning", choices=TUNINGS,
        help="SAM's encoder: all of it, LoRA on its queries and values, or nothing; "
        "decoder, prompts and adapter always are (full)")  # fmt: skip
    model("--lora_weight", type=Path, metavar="FILE",
        help="start LoRA from a file named as SAMed's (.pth, .safetensors)")  # fmt: skip
    model("--init", type=Path, metavar="PATH",
        help="start from a checkpoint of other classes; what fits is taken")  # fmt: skip
    model("--rel_pos", choices=("published", "corrected"),
        help="sam-med3d: positions as the published weights need them (published)")  # fmt: skip
    model("--img_size", type=positive, help="side of the input, pixels, a multiple of 16 (224)")
    model("--input", choices=("2d", "2.5d"),
        help="a slice alone, or between its neighbours as three channels (2d)")  # fmt: skip
    model("--prompt_mode", type=prompt_mode, choices=(*PROMPT_MODES, MIXED),
        help="0 no prompts, 1 boxes, 2 points (3 a class), 3 both; "
        "mixed: trained on all four in turn, evaluated with none (0)")  # fmt: skip
    model("--prompt_jitter", type=jitter, metavar="N|N%",
        help="train with prompts up to N pixels, or %% of the image, off (0)")  # fmt: skip
    train = parser.add_argument_group("training").add_argument
    train("--epochs", type=positive, help="passes over the training data (100; 200)")
    train("--batch_size", type=positive, help="samples a batch and process (24; 12)")
    train("--accumulation_steps", type=positive, help="batches a step (1; 20)")
    train("--lr", type=non_negative, help="rate of decoder and prompts (1e-3; 8e-5)")
    train("--lr_vit", type=non_negative, help="rate of SAM's encoder (1e-4; 8e-4)")
    train("--lr_backbone", type=non_negative, help="rate of the down path (1e-4)")
    train("--weight_decay", type=non_negative, help="AdamW's (1e-4; 0.1)")
    train("--rounds", type=positive, help="sam-med3d: clicks simulated in a training step (11)")
    train("--warmup", action="store_true", default=None,
        help="ramp the rates up over half an epoch")  # fmt: skip
    train("--clip_max_norm", type=non_negative, help="gradient norm limit (0: off)")
    train("--seed", type=count, help="of everything drawn at random (202307)")
    add_recipe_flags(train)
    run = parser.add_argument_group("run").add_argument
    run("--small_checkpoints", action="store_true", default=None,
        help="lora, decoder: save without SAM's frozen part; "
        "--resume then needs SAM's file")  # fmt: skip
    run("--export_lora", type=Path, metavar="FILE",
        help="write --resume's LoRA under SAMed's names (.pth, .safetensors)")  # fmt: skip
    run("--clicks", choices=("random", "largest"),
        help="sam-med3d: --eval clicks any error or the largest (random)")  # fmt: skip
    run("--eval", action="store_true", help="evaluate --resume on the test cases")
    run("--resume", nargs="+", type=Path, metavar="PATH|auto",
        help="checkpoint to go on from or evaluate, or several to average; "
        "auto: the newest one, if any")  # fmt: skip
    run("--tensorboard", action="store_true", help="write curves for TensorBoard, too")
    run("--override", action="store_true",
        help="go on from --resume although flags or data changed")  # fmt: skip
    run("--save_every", type=positive, metavar="STEPS", help="save within epochs, too")
    run("--keep", type=count, default=1, metavar="N",
        help="predecessors of best.pth and last.pth that stay (1)")  # fmt: skip
    run("--start_epoch", type=count, help="first epoch, instead of the checkpoint's")
    run("--output_dir", type=Path, default=Path("chkpt"), help="for all that is written (chkpt)")
    run("--device", default="auto", metavar="auto|cuda|mps|cpu", help="where to compute (auto)")
    run("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision (auto: what the device is fast at)")  # fmt: skip
    run("--compile", choices=("auto", "on", "off"), default="auto",
        help="torch.compile the training step (auto: u-sam on CUDA)")  # fmt: skip
    run("--checkpoint_activations", action="store_true",
        help="train large images in less memory and more time")  # fmt: skip
    run("--world_size", type=positive, default=1, help="processes, where srun starts them (1)")
    run("--dist_url", default="env://", help="tcp://host:port where those meet")
    add_evaluation_flags(parser)
    add_prediction_flags(parser)
    args = parser.parse_args(arguments)
    check_evaluation_flags(parser, args)
    if args.val_fraction is not None and not 0 <= args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction}: wanted 0 or more and below 1")
    if args.val_fraction is not None and args.fold is not None:
        parser.error("--fold says who validates, and so does --val_fraction; give one of them")
    if args.img_size and args.img_size % 16:
        parser.error(f"--img_size {args.img_size}: wanted a multiple of 16")
    if args.lora_weight and args.resume not in (None, AUTO):
        parser.error("--lora_weight is what a run starts from; --resume has its own LoRA")
    if args.export_lora and args.resume in (None, AUTO):
        parser.error("--export_lora needs --resume PATH, the checkpoint to take LoRA from")
    if args.export_lora and (args.eval or args.predict):
        parser.error("--export_lora writes a file and ends; give it without --eval and --predict")
    if args.eval and not args.resume and args.model != "sam-med3d":
        parser.error("--eval needs --resume, the checkpoint to evaluate")
    check_resume(parser, args)
    check_prediction_flags(parser, args)
    return args


def check_resume(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one line where --resume does not fit what stands beside it."""
    if args.resume == AUTO:
        if args.eval or args.predict:
            parser.error("--resume auto goes on training; name a checkpoint here, as best.pth")
    elif args.resume and args.init is not None:
        parser.error("--init is for a fresh start and --resume is none; give one of them")


def add_recipe_flags(flag: Callable[..., Any]) -> None:
    """The flags that `--recipe` sets together."""
    flag("--recipe", choices=list(RECIPES),
        help="the flags below as published, or as they scored best (published)")  # fmt: skip
    flag("--augment", choices=("published", "strong"),
        help="turns, flips; or small turns, scale, shift, gamma, noise (published)")  # fmt: skip
    flag("--class_weights", type=class_weights, metavar="none|balanced|W,W,...",
        help="of the cross-entropy, background first (none)")  # fmt: skip
    flag("--focal_gamma", type=non_negative, metavar="G",
        help="focal loss instead of cross-entropy (0: cross-entropy)")  # fmt: skip
    flag("--foreground_share", type=share, metavar="N%",
        help="slices of an epoch drawn for a class they show, any class as likely (0)")  # fmt: skip
    flag("--ema", type=decay, metavar="DECAY",
        help="validate and predict with averaged weights, e.g. 0.99 (0: off)")  # fmt: skip
    flag("--patience", type=count, metavar="EPOCHS",
        help="stop after so many epochs without a better validation score (0: off)")  # fmt: skip


def add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of --predict."""
    group = parser.add_argument_group("prediction")
    flag = group.add_argument
    flag("--predict", nargs="+", type=Path, metavar="PATH",
        help="segment scans: NIfTI, NRRD, npz, DICOM series folders, folders of scans")  # fmt: skip
    flag("--window", nargs="+", metavar="W",
        help="LOW HIGH (HU), percentile or a preset, instead of the checkpoint's")  # fmt: skip
    flag("--channel", type=count, help="which of several volumes in a file, from 0")
    flag("--box", nargs="+", type=float, action="append", metavar="V",
        help="x1 y1 x2 y2 on --slice, repeatable; sam-med3d: x1 y1 z1 x2 y2 z2")  # fmt: skip
    flag("--slice", type=count, action="append", metavar="K",
        help="the slice of a --box, from 0, one for each box")  # fmt: skip
    flag("--point", nargs="+", type=float, action="append", metavar="V",
        help="x y z [label]: voxel from 0, label 1 object or 0 not; repeatable")  # fmt: skip
    flag("--mm", action="store_true", help="--point is in scanner millimetres (RAS)")
    flag("--prompts", type=Path, metavar="FILE", help="boxes and points as JSON, also for many")
    flag("--init_mask", type=Path, metavar="PATH",
        help="sam-med3d: a label map of the scan to refine")  # fmt: skip
    flag("--probabilities", action="store_true", help="also a 4D NIfTI of class probabilities")
    flag("--overlay", action="store_true", help="also a PNG of the slices with most foreground")
    flag("--largest_component", action="store_true", help="keep the largest piece of each class")


def check_prediction_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one line where the flags of --predict do not fit together."""
    if args.predict:
        if not args.resume and args.model != "sam-med3d":
            parser.error("--predict needs --resume, the checkpoint to predict with")
        if args.eval:
            parser.error("--predict and --eval are two runs; give one of them")
    marks = {"box": args.box, "slice": args.slice, "point": args.point, "prompts": args.prompts}
    given = [name for name, value in marks.items() if value is not None]
    rest = ["window", "channel", "mm", "probabilities", "overlay", "largest_component", "init_mask"]
    alone = given + [name for name in rest if getattr(args, name) not in (None, False)]
    if alone and not args.predict:
        parser.error(f"--{alone[0]} belongs to --predict")
    if args.prompts and (len(given) > 1 or args.mm):
        parser.error("--prompts replaces --box, --slice, --point and --mm; give one or the other")
    if args.slice and len(args.slice) != len(args.box or []):
        parser.error(f"{len(args.slice)} --slice for {len(args.box or [])} --box; give one each")
    if any(len(point) not in (3, 4) for point in args.point or []):
        parser.error("--point wants x y z or x y z label")
    if args.mm and not args.point and not (args.box and args.model != "u-sam"):
        parser.error("--mm says what --point is in; there is none")


def settle(args: argparse.Namespace, saved: dict[str, Any] | None) -> None:
    """Fill the flags left out: from `saved`, a checkpoint, what describes its model; else DEFAULTS.

    Training that goes on from `saved` also takes the other values of DEFAULTS from there; the
    values of a --recipe that is given come before both. A model of mixed prompts is evaluated with
    none unless told otherwise.
    Raises ValueError where a flag was given and the checkpoint's model is another, or where the
    model has no such flag.
    """
    described = {}
    if saved:
        described["model"] = saved["args"].get("model", "u-sam")
    args.model = args.model or described.get("model", "u-sam")
    own = DEFAULTS[args.model]
    if saved:
        known = SINCE | saved["args"] | saved["data"]
        described |= {name: known[name] for name in DESCRIBED if name in own and name in known}
    check_model_flags(args)
    defaults = dict(own)
    if saved and not args.eval and not args.predict:
        defaults |= {name: value for name, value in saved["args"].items() if name in own}
    if args.model == "u-sam" and args.recipe:
        defaults |= RECIPES[args.recipe]
    for name, value in (defaults | described).items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, value)
        elif name in described and given != value and name != "prompt_mode":
            raise ValueError(f"--{name} {given}, but {args.resume} was trained with {value}")
    if args.eval and args.model == "u-sam" and args.prompt_mode == MIXED:
        args.prompt_mode = 0


def check_model_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that are not for --model, and --box, --dataset that do not fit.

    A single --data_root comes out as a path, several as a list.
    """
    other = {name for flags in DEFAULTS.values() for name in flags} - DEFAULTS[args.model].keys()
    other |= {name for model, names in ONLY_FOR.items() if model != args.model for name in names}
    for name in sorted(other):
        if (given := getattr(args, name)) is not None and given is not False:  # 0 was given, too
            said = "several --resume are" if name == "ensemble" else f"--{name} is"
            raise ValueError(f"{said} not for --model {args.model}; leave it out")
    if args.dataset and (args.dataset in DATASETS_3D) != (args.model == "sam-med3d"):
        raise ValueError(f"--dataset {args.dataset} is not for --model {args.model}")
    wanted = BOX_LENGTH[args.model]
    if any(len(box) != wanted for box in args.box or []):
        raise ValueError(f"--box wants {wanted} numbers for --model {args.model}")
    if args.data_root and len(args.data_root) == 1:
        args.data_root = args.data_root[0]
    elif args.data_root and args.model == "u-sam":
        raise ValueError(f"--data_root names {len(args.data_root)} folders, wanted one")
