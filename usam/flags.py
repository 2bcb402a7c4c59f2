"""The command line of u-sam.py: every flag, its check and its one-line help.

Only u-sam.py calls this and sees what it returns; the rest of the package takes plain arguments.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from usam.sam_vit import SAM_MODELS


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, not below a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def parse_flags(datasets: Iterable[str], arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked one by one; those left at None take a checkpoint's value or a default.

    datasets: the names --dataset may take. Exits with one line and code 2 on a bad flag.
    """
    parser = Parser(description="Tune SAM to segment CT slices.")
    data = parser.add_argument_group("data").add_argument
    data("--dataset", choices=sorted(datasets), default="rectum", help="what to work on")
    data("--data_root", type=Path, help="its folder (data/CARE, data/WORD, data/phantom)")
    data(
        "--val_fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the training cases to validate on; 0: on the test cases (0.1)",
    )
    data("--num_workers", type=count, default=2, help="loader processes for each process (2)")
    model = parser.add_argument_group("model").add_argument
    model("--sam_model", choices=list(SAM_MODELS), help="the encoder's size (vit_b)")
    model("--sam_weight", metavar="PATH|none", help="SAM's checkpoint (in weight/, downloaded)")
    model("--img_size", type=positive, help="side of the input, pixels, a multiple of 16 (224)")
    model(
        "--prompt_mode",
        type=int,
        choices=(0, 1, 2, 3),
        help="0 no prompts, 1 boxes, 2 points (3 a class), 3 both (0)",
    )
    train = parser.add_argument_group("training").add_argument
    train("--epochs", type=positive, default=100, help="passes over the training slices (100)")
    train("--batch_size", type=positive, default=24, help="slices a step and process (24)")
    train("--accumulation_steps", type=positive, default=1, help="batches a step (1)")
    train("--lr", type=non_negative, default=1e-3, help="rate of decoder and prompts (1e-3)")
    train("--lr_vit", type=non_negative, default=1e-4, help="rate of SAM's encoder (1e-4)")
    train("--lr_backbone", type=non_negative, default=1e-4, help="rate of the down path (1e-4)")
    train("--weight_decay", type=non_negative, default=1e-4, help="AdamW's (1e-4)")
    train("--warmup", action="store_true", help="ramp the rates up over half an epoch")
    train("--clip_max_norm", type=non_negative, default=0.0, help="gradient norm limit (0: off)")
    train("--seed", type=count, default=202307, help="of everything drawn at random (202307)")
    run = parser.add_argument_group("run").add_argument
    run("--eval", action="store_true", help="evaluate --resume on the test cases")
    run("--resume", type=Path, metavar="PATH", help="checkpoint to go on from or to evaluate")
    run("--start_epoch", type=count, help="first epoch, instead of the checkpoint's")
    run("--output_dir", type=Path, default=Path("chkpt"), help="for all that is written (chkpt)")
    run("--device", default="auto", metavar="auto|cuda|mps|cpu", help="where to compute (auto)")
    run("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision (auto: what the device is fast at)")  # fmt: skip
    run("--world_size", type=positive, default=1, help="processes, where srun starts them (1)")
    run("--dist_url", default="env://", help="tcp://host:port where those meet")
    args = parser.parse_args(arguments)
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction}: wanted 0 or more and below 1")
    if args.img_size and args.img_size % 16:
        parser.error(f"--img_size {args.img_size}: wanted a multiple of 16")
    if args.eval and not args.resume:
        parser.error("--eval needs --resume, the checkpoint to evaluate")
    return args


def count(text: str) -> int:
    """An integer of 0 or more, as a flag's value."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def positive(text: str) -> int:
    """An integer of 1 or more, as a flag's value."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def non_negative(text: str) -> float:
    """A finite number of 0 or more, as a flag's value."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return number
