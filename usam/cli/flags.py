"""The command line of u-sam.py: what its flags default to and how they go together.

Only u-sam.py calls this and sees what comes back; the rest of the package takes plain arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from usam.cli import flag_groups
from usam.cli.choices import AUTO, MIXED
from usam.cli.flags_evaluation import add_evaluation_flags, check_evaluation_flags
from usam.cli.recipes import RECIPES

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
        description="Tune SAM to segment CT scans.",
        epilog="Exit codes: 0 done; 2 bad input; 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C, all "
        "saved; 130 interrupted.",
    )
    flag_groups.add_data_flags(parser, datasets)
    flag_groups.add_model_flags(parser)
    flag_groups.add_training_flags(parser)
    flag_groups.add_recipe_flags(parser)
    flag_groups.add_run_flags(parser)
    add_evaluation_flags(parser)
    flag_groups.add_prediction_flags(parser)
    args = parser.parse_args(arguments)
    check_evaluation_flags(parser, args)
    check_validation(parser, args)
    check_lora_files(parser, args)
    check_resume(parser, args)
    check_prediction_flags(parser, args)
    return args


def check_validation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one line where --val_fraction, --fold or --img_size are out of the question."""
    if args.val_fraction is not None and not 0 <= args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction}: wanted 0 or more and below 1")
    if args.val_fraction is not None and args.fold is not None:
        parser.error("--fold says who validates, and so does --val_fraction; give one of them")
    if args.img_size and args.img_size % 16:
        parser.error(f"--img_size {args.img_size}: wanted a multiple of 16")


def check_lora_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one line where a LoRA file is named beside what it does not go with."""
    if args.lora_weight and args.resume not in (None, AUTO):
        parser.error("--lora_weight is what a run starts from; --resume has its own LoRA")
    if args.export_lora and args.resume in (None, AUTO):
        parser.error("--export_lora needs --resume PATH, the checkpoint to take LoRA from")
    if args.export_lora and (args.eval or args.predict):
        parser.error("--export_lora writes a file and ends; give it without --eval and --predict")


def check_resume(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one line where --resume does not fit what stands beside it."""
    if args.eval and not args.resume and args.model != "sam-med3d":
        parser.error("--eval needs --resume, the checkpoint to evaluate")
    if args.resume == AUTO:
        if args.eval or args.predict:
            parser.error("--resume auto goes on training; name a checkpoint here, as best.pth")
    elif args.resume and args.init is not None:
        parser.error("--init is for a fresh start and --resume is none; give one of them")


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
        other = next(name for name in DEFAULTS if name != args.model)
        whose = f"{args.resume} is a {args.model} model" if args.resume else f"--model {args.model}"
        raise ValueError(f"--dataset {args.dataset} is for --model {other}; {whose}")
    wanted = BOX_LENGTH[args.model]
    if any(len(box) != wanted for box in args.box or []):
        raise ValueError(f"--box wants {wanted} numbers for --model {args.model}")
    if args.data_root and len(args.data_root) == 1:
        args.data_root = args.data_root[0]
    elif args.data_root and args.model == "u-sam":
        raise ValueError(f"--data_root names {len(args.data_root)} folders, wanted one")
