"""Parses the command line; flags left out take their value from the checkpoint or the defaults."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

from usam.cli.checks import check_cache, check_flags, check_model_flags
from usam.cli.choices import (
    AUTO_RECIPE,
    DATASET_DEFAULTS,
    MIXED,
    OUTPUT_DIR,
    PLANNED,
    RECIPES,
)
from usam.cli.flags import DEFAULTS, FLAGS, MED3D, REMOVED, USAM, Flag

NEGATIVE = re.compile(r"-\d+\.?\d*[eE][-+]?\d{1,3}", re.ASCII)
MAX_MESSAGE = 600  # characters
EXIT_CODES = (
    "Exit codes: 0 done; 2 bad input; 75 stopped by SIGTERM, SIGUSR1, SIGHUP or Ctrl-C with "
    "everything saved (resume with --resume auto); 130 interrupted."
)
# What checkpoints from before a flag were trained with.
BEFORE = {"adapter": "u", "tuning": "full", "input": "2d"}
HINTS = {
    "local_rank": "launch with torchrun, or give torch.distributed.launch --use_env",
    "patience": "it was removed; training ends after --epochs, and best.pth holds the best epoch",
    "focal_gamma": "it was removed; see --class_weights",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that prints an error as one line, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists all flags)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # BrokenPipeError here, as in `--help | head`, not when Python ends
        super().exit(status, message)


class _Checker(Parser):
    """A parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(one_line(message))


def one_line(text: str) -> str:
    """`text` on one line: control characters as escapes, the middle of a long one cut."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = MAX_MESSAGE // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def build_parser(kind: type[Parser] = Parser) -> Parser:
    """The parser of all rows of FLAGS."""
    parser = kind(
        prog="u-sam.py",
        usage="python u-sam.py [--FLAG VALUE ...]",
        description="Train SAM to segment CT scans, evaluate it and predict with it.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in FLAGS:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(f"--{flag.name}", **_options(flag))
    return parser


def _options(flag: Flag) -> dict[str, Any]:
    """A flag as arguments of add_argument. Values that a checkpoint may supply start as None."""
    options: dict[str, Any] = {"help": help_text(flag).replace("%", "%%")}
    if flag.type is None:
        return options | {"action": "store_true", "default": None if flag.resume else False}
    options |= {"type": flag.type, "default": None if flag.resume else flag.default}
    extra = {"choices": flag.choices, "nargs": flag.nargs, "metavar": flag.metavar}
    extra["const"] = flag.const
    options |= {name: value for name, value in extra.items() if value}
    return options | ({"action": "append"} if flag.repeated else {})


def help_text(flag: Flag) -> str:
    """A flag's help text: the model and modes it belongs to, what it does, its default."""
    runs = " and ".join(f"--{run}" for run in flag.runs)
    scope = ", ".join(part for part in (flag.model and f"{flag.model} only", runs) if part)
    default = default_text(flag)
    return f"{f'({scope}) ' if scope else ''}{flag.help}{default and f' (default: {default})'}"


def default_text(flag: Flag) -> str:
    """The default in words: of both models where they differ; "" for a value that has none."""
    if flag.shown:
        return flag.shown
    shown = {model: _shown(flag.default_of(model)) for model in (USAM, MED3D)}
    if flag.model or shown[USAM] == shown[MED3D]:
        return shown[flag.model or USAM]
    return f"{shown[USAM]}; {MED3D}: {shown[MED3D]}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def flags_of(values: Mapping[str, Any]) -> Namespace:
    """The flags that have these values, as `parse_flags` gives them; ValueError where it exits.

    None and False stand for a flag that is left out, True for one without a value.
    """
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)] if value else []
        else:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return parse_flags(words, _Checker)


def parse_flags(arguments: list[str] | None = None, kind: type[Parser] = Parser) -> Namespace:
    """The flags, each checked and checked against the others; exits with one line and code 2.

    Those that a checkpoint may fill in are None until `fill_defaults`.
    """
    parser = build_parser(kind)
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in arguments:
        if word.startswith("--") and word.endswith("=--"):  # argparse fails on this value
            parser.error(f"argument {word[:-3]}: '--' is not a value")
    # Of negative numbers, argparse takes -1e3 for a flag.
    plain = [f"{float(word):f}" if NEGATIVE.fullmatch(word) else word for word in arguments]
    args, unknown = parser.parse_known_args(plain)
    if unknown:
        parser.error(unknown_text(unknown))
    check_flags(parser, args)
    if args.output_dir is None:
        own = DATASET_DEFAULTS.get(args.dataset, {})
        args.output_dir = own.get("output_dir", OUTPUT_DIR)
    return args


def unknown_text(unknown: list[str]) -> str:
    """The error message for unknown arguments, with the closest existing flag."""
    flag = next((word for word in unknown if word.startswith("-") and word != "--"), None)
    if flag is None:
        return f"{unknown[0]!r} is an unexpected argument"
    name = flag.partition("=")[0].strip("-").replace("-", "_")
    if name in HINTS:
        return f"{flag}: no such flag; {HINTS[name]}"
    close = difflib.get_close_matches(name, [known.name for known in FLAGS], n=1, cutoff=0.5)
    return f"{flag}: no such flag" + (f"; did you mean --{close[0]}?" if close else "")


def fill_defaults(args: Namespace, saved: dict[str, Any] | None) -> None:
    """Fill in the flags that were left out: from the checkpoint `saved`, else the defaults.

    Training resumed from `saved` takes all its values from there, evaluation and prediction those
    that describe the model; the values of a given --recipe come first. A data set may have defaults
    of its own for a fresh training without --recipe, see DATASET_DEFAULTS. Flags that --recipe auto
    is yet to plan stay None. A model trained on mixed prompts is evaluated without prompts unless
    --prompt_mode is given.
    Raises ValueError where a flag contradicts the checkpoint's model, or --model does not have it.
    """
    described: dict[str, Any] = {}
    if saved:
        described["model"] = saved["args"].get("model", USAM)
    args.model = args.model or described.get("model", USAM)
    defaults = dict(DEFAULTS[args.model])
    if saved:
        known = BEFORE | saved["args"] | saved["data"]
        names = [flag.name for flag in FLAGS if flag.resume == "model" and flag.fits(args.model)]
        described |= {name: known[name] for name in names if name in known}
    check_model_flags(args)
    if saved and is_training(args):
        check_removed(args, saved["args"])
        check_recipe(args, saved["args"])
        defaults |= {name: value for name, value in saved["args"].items() if name in defaults}
    if not saved and not args.recipe and args.dataset in DATASET_DEFAULTS:
        own = DATASET_DEFAULTS[args.dataset]
        defaults |= {name: value for name, value in own.items() if name in defaults}
        args.sam_weight = args.sam_weight or own.get("sam_weight")
        args.recipe = own.get("recipe")
    if args.model == USAM and args.recipe == AUTO_RECIPE and not saved and is_training(args):
        defaults = {name: value for name, value in defaults.items() if name not in PLANNED}
    elif args.model == USAM:
        defaults |= RECIPES.get(args.recipe, {})
    if args.cache_embeddings and (not saved or args.recipe):  # a preset's augmentation gives way
        defaults["augment"] = "none"
        defaults.setdefault("tuning", "full")
    for name, value in (defaults | described).items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, value)
        elif name in described and given != value and name != "prompt_mode":
            raise ValueError(f"--{name} {given}, but {args.resume} was trained with {value}")
    if args.eval and args.model == USAM and args.prompt_mode == MIXED:
        args.prompt_mode = 0
    check_cache(args)


def is_training(args: Namespace) -> bool:
    """Whether the run trains, rather than evaluates, predicts, serves or converts."""
    others = ("eval", "predict", "serve", "annotate", "export_lora", "export_weights", "merge")
    return not any(getattr(args, other) for other in others)


def check_recipe(args: Namespace, trained: dict[str, Any]) -> None:
    """Raises ValueError where --recipe auto is given to resume a run that was not planned."""
    if args.recipe == AUTO_RECIPE != (recipe := trained.get("recipe", "published")):
        raise ValueError(
            f"--recipe auto plans new trainings only; {args.resume} was trained with --recipe "
            f"{recipe}: leave it out"
        )


def check_removed(args: Namespace, trained: dict[str, Any]) -> None:
    """Raises ValueError if training would resume with a flag that was removed.

    With --override the flag is switched off, and that is printed.
    """
    for name, off in REMOVED.items():
        if trained.get(name) not in (None, off):  # None: not a flag of this model
            text = f"{args.resume} was trained with --{name} {trained[name]}, which was removed"
            if not args.override:
                raise ValueError(f"{text}; --override continues without it")
            print(f"warning: {text}; continuing without it", flush=True)
