"""The flags of --eval and --merge, and of models that answer together.

usam.flags adds them to the others and checks them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from usam.cli.choices import TTA
from usam.cli.flag_values import above_zero


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags themselves."""
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--spacing", nargs=3, type=above_zero, metavar=("Z", "Y", "X"),
        help="mm between slices, rows, columns, where the data do not say (pixels)")  # fmt: skip
    flag("--prompt_sweep", action="store_true",
        help="also the scores with all prompts, exact and careless")  # fmt: skip
    flag("--tta", choices=TTA,
        help="--eval, --predict: average over 4 or 8 views of each slice (off)")  # fmt: skip
    flag("--merge", nargs="+", type=Path, metavar="FOLDER",
        help="one report of the cases of several --eval, as of all folds")  # fmt: skip


def check_evaluation_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with one line where they do not fit together.

    Several --resume come out as `resume`, the first, and `ensemble`, the others or None.
    """
    args.resume, *others = args.resume or [None]
    args.ensemble = others or None
    answering = args.eval or args.predict
    for name in ("spacing", "prompt_sweep"):
        if getattr(args, name) and not args.eval:
            parser.error(f"--{name} belongs to --eval")
    if args.tta and not answering:
        parser.error("--tta belongs to --eval and --predict")
    if args.ensemble and not answering:
        parser.error(
            f"--resume names {1 + len(others)} checkpoints; training goes on from one, only "
            "--eval and --predict average several"
        )
    if args.merge and (answering or args.resume):
        parser.error("--merge reads what --eval wrote; give only folders and --output_dir")
