"""Checks of the flags against each other and against the model."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

from usam.cli.choices import AUTO, AUTO_RECIPE, DATASET_DEFAULTS, MODELS, VOLUMES
from usam.cli.flags import FLAGS, MAX_WORKERS, MED3D, USAM

SLICE_BOX, VOLUME_BOX = 4, 6  # numbers
BOX_LENGTH = {USAM: SLICE_BOX, MED3D: VOLUME_BOX}
WORKERS_PER_CORE = 4  # more are slower, not faster

EXPORTS = ("export_lora", "export_weights")

# Two flags of which one at most may be given, and why.
EXCLUSIVE = (
    ("predict", "eval", "they are separate runs"),
    ("budget", "epochs", "both set the length of the training"),
    ("budget", "resume", "a resumed run keeps its plan; a new plan is for a new training"),
    ("val_fraction", "fold", "both choose the validation cases"),
    *((name, run, f"--{name} only writes a file")
      for name in EXPORTS for run in ("eval", "predict", "serve", "annotate")),
    ("export_lora", "export_weights", "each is for another model"),
    ("lora_weight", "resume", "the checkpoint of --resume has LoRA weights of its own"),
    ("init", "resume", "--init is for a new training"),
    ("serve", "eval", "they are separate runs"),
    ("serve", "predict", "they are separate runs"),
    ("serve", "merge", "they are separate runs"),
    ("annotate", "eval", "they are separate runs"),
    ("annotate", "predict", "they are separate runs"),
    ("annotate", "merge", "they are separate runs"),
    ("merge", "eval", "--merge reads the output folders of earlier --eval runs"),
    ("merge", "predict", "--merge reads the output folders of earlier --eval runs"),
    ("merge", "resume", "--merge reads the output folders of earlier --eval runs"),
    ("cache_embeddings", "eval", "--cache_embeddings is for training"),
    ("cache_embeddings", "predict", "--cache_embeddings is for training"),
    ("cache_embeddings", "serve", "--cache_embeddings is for training"),
    ("cache_embeddings", "annotate", "--cache_embeddings is for training"),
    ("prompts", "box", "the file of --prompts replaces it"),
    ("prompts", "slice", "the file of --prompts replaces it"),
    ("prompts", "point", "the file of --prompts replaces it"),
    ("prompts", "mm", "the file of --prompts has its own \"mm\""),
)  # fmt: skip


def check_flags(parser: ArgumentParser, args: Namespace) -> None:
    """Exits with one line if the flags cannot be combined.

    Several --resume become `resume`, the first, and `ensemble`, the others or None.
    """
    args.resume, *others = args.resume or [None]
    args.ensemble = others or None
    check_pairs(parser, args)
    check_resume(parser, args)
    check_prompts(parser, args)
    check_budget(parser, args)
    check_counts(parser, args)


def is_given(args: Namespace, name: str) -> bool:
    """Whether a flag was given; `--resume auto` does not count, as it names no checkpoint."""
    value = getattr(args, name)
    return value is not None and value is not False and not (name == "resume" and value == AUTO)


def check_pairs(parser: ArgumentParser, args: Namespace) -> None:
    """Exits if a flag lacks the mode it belongs to, or if two flags exclude each other."""
    for flag in FLAGS:
        if flag.runs and is_given(args, flag.name) and not any(getattr(args, r) for r in flag.runs):
            parser.error(f"--{flag.name} needs {' or '.join(f'--{run}' for run in flag.runs)}")
    for first, second, reason in EXCLUSIVE:
        if is_given(args, first) and is_given(args, second):
            parser.error(f"--{first} and --{second} cannot be combined: {reason}")


def check_resume(parser: ArgumentParser, args: Namespace) -> None:
    """Exits if a mode needs a checkpoint, or another form of --resume."""
    for run in ("eval", "predict", "serve", "annotate", *EXPORTS):
        if not is_given(args, run):
            continue
        if args.resume == AUTO:
            parser.error(f"--{run} needs the path of a checkpoint: --resume best.pth, not auto")
        if args.resume is None and run == "predict" and args.model != MED3D:
            check_untrained(parser, args)
        elif args.resume is None and (run in EXPORTS or args.model != MED3D):
            parser.error(f"--{run} needs --resume PATH, the checkpoint to use")
    if args.ensemble and AUTO in (args.resume, *args.ensemble):
        parser.error("--resume auto is one checkpoint; name several by their paths")
    if args.ensemble and not (args.eval or args.predict):
        parser.error(
            f"--resume names {1 + len(args.ensemble)} checkpoints; training continues from one, "
            "only --eval and --predict average several"
        )


def check_untrained(parser: ArgumentParser, args: Namespace) -> None:
    """Exits if --predict with SAM's weights lacks prompts, or has flags that need a checkpoint."""
    if not (args.box or args.point or args.prompts):
        parser.error(
            "--predict needs --resume PATH, or --box, --point or --prompts to segment with the "
            "weights of --sam_weight alone"
        )
    for name in ("probabilities", "tta", "img_size", "prompt_mode", "input"):
        if is_given(args, name):
            parser.error(f"--{name} needs --resume PATH; SAM's own weights have no such choice")


def check_prompts(parser: ArgumentParser, args: Namespace) -> None:
    """Exits if --box, --slice, --point and --mm cannot be combined."""
    boxes, slices, points = args.box or [], args.slice or [], args.point or []
    if slices and len(slices) != len(boxes):
        parser.error(f"--slice is given {len(slices)}x and --box {len(boxes)}x; give one per box")
    if any(len(point) not in (3, 4) for point in points):
        parser.error("--point: expected x y z or x y z label")
    if any(len(point) == 4 and point[3] not in (0, 1) for point in points):
        parser.error("--point: the label must be 1 (object) or 0 (background)")
    in_3d = any(len(box) == VOLUME_BOX for box in boxes)
    if args.mm and not points and not in_3d:
        parser.error("--mm needs --point, or a --box of x1 y1 z1 x2 y2 z2")
    if in_3d and slices:
        parser.error("--slice is for a --box of x1 y1 x2 y2")
    if args.lps and not (args.mm or args.prompts):
        parser.error("--lps needs --mm, or --prompts with coordinates in mm")


def check_budget(parser: ArgumentParser, args: Namespace) -> None:
    """Exits where --budget is given without --recipe auto, for which it is."""
    recipe = args.recipe or DATASET_DEFAULTS.get(args.dataset, {}).get("recipe")
    if is_given(args, "budget") and recipe != AUTO_RECIPE:
        parser.error("--budget needs --recipe auto; with other recipes --epochs sets the length")


def check_counts(parser: ArgumentParser, args: Namespace) -> None:
    """Exits for sizes and numbers of processes that cannot work; warns of many processes."""
    if args.img_size and args.img_size % 16:
        parser.error(f"--img_size {args.img_size}: expected a multiple of 16")
    try:
        here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    except ValueError:
        here, is_first = 1, True  # named when the processes are started
    workers, cores = here * args.num_workers, os.cpu_count() or 1
    if workers > MAX_WORKERS:
        parser.error(
            f"--num_workers {args.num_workers} in {here} processes: {workers} workers, "
            f"at most {MAX_WORKERS} are allowed"
        )
    if workers > WORKERS_PER_CORE * cores and is_first:
        print(
            f"warning: {workers} DataLoader workers on {cores} CPU cores; "
            f"--num_workers {max(1, cores // here)} is usually faster",
            file=sys.stderr,
            flush=True,
        )


def check_model_flags(args: Namespace) -> None:
    """Raises ValueError if flags, --box or --dataset do not belong to --model.

    A single --data_root becomes a path, several stay a list.
    """
    for flag in FLAGS:
        if not flag.fits(args.model) and is_given(args, flag.name):
            raise ValueError(f"--{flag.name} is not for --model {args.model}; leave it out")
    if args.ensemble and args.model == MED3D:
        raise ValueError(f"several --resume are not for --model {args.model}; give one")
    if args.dataset and (args.dataset in VOLUMES) != (args.model == MED3D):
        other = next(name for name in MODELS if name != args.model)
        whose = f"{args.resume} is a {args.model} model" if args.resume else f"--model {args.model}"
        raise ValueError(f"--dataset {args.dataset} is for --model {other}; {whose}")
    lengths = {len(box) for box in args.box or []}
    untrained = args.model == USAM and args.predict and not args.resume
    if lengths - ({SLICE_BOX, VOLUME_BOX} if untrained else {BOX_LENGTH[args.model]}):
        expected = "4 or 6" if untrained else BOX_LENGTH[args.model]
        raise ValueError(f"--box: expected {expected} numbers for --model {args.model}")
    if len(lengths) > 1:
        raise ValueError("--box: give boxes on slices or a 3D box, not both")
    if args.data_root and len(args.data_root) == 1:
        args.data_root = args.data_root[0]
    elif args.data_root and args.model == USAM:
        raise ValueError(f"--data_root names {len(args.data_root)} folders; give one")


def check_cache(args: Namespace) -> None:
    """Raises ValueError for --cache_embeddings where an embedding changes while training."""
    if not args.cache_embeddings:
        return
    whose = f" ({args.resume} was trained so)" if args.resume else ""
    if args.tuning != "decoder":
        raise ValueError(
            f"--cache_embeddings needs --tuning decoder: --tuning {args.tuning}{whose} trains "
            "SAM's encoder"
        )
    if args.adapter != "none" and args.sam_model != "vit_t":
        raise ValueError(
            f"--cache_embeddings needs --adapter none or --sam_model vit_t: with --adapter u{whose}"
            " SAM's encoder sees what the trained down path makes of a slice"
        )
    if args.augment != "none":
        raise ValueError(
            f"--cache_embeddings needs --augment none: --augment {args.augment}{whose} draws "
            "other slices in every epoch"
        )
