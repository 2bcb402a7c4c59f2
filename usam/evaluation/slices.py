"""--eval for U-SAM: the test slices or those of a fold, one model or several, and the report."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dataset import SliceDataset, build_dataset
from dataset.palette import class_colors
from usam.evaluation.cases import evaluate_cases, known_spacings
from usam.evaluation.checks import (
    Checkpoint,
    any_record,
    check_held_out,
    check_preparation,
    small_tolerances,
)
from usam.evaluation.metrics import distinct
from usam.evaluation.pixels import PROMPT_SOURCES, predictions
from usam.evaluation.prompt_sweep import TITLE, sweep_facts, sweep_prompts, sweep_table
from usam.evaluation.report import save_report
from usam.evaluation.report_tables import CaseReport
from usam.runtime.figures import save_overlay
from usam.runtime.loaders import evaluation_loader
from usam.runtime.precision import Precision
from usam.runtime.processes import is_main, main_process_first, say
from usam.weights.inference import answers_text, load_for_inference, read_members

NUM_OVERLAYS = 8


def evaluate(args: Namespace, precision: Precision, saved: dict[str, Any]) -> None:
    """Print and save the scores of `--resume`, pooled and by case, with pictures.

    Raises ValueError where a checkpoint does not fit the data or was trained on them, and for
    answers that are not finite.
    """
    data, members = open_data(args), read_members(args, saved)
    used, notes = check_fit(args, data, members)
    model, row_col = load_for_inference(
        args, precision.device, saved, data.info["fold_digest"], members
    )
    how = {"precision": precision, "points_are_row_col": row_col}
    load = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    prompted = how | {"prompt_mode": args.prompt_mode}
    spacing = args.spacing and tuple(args.spacing)
    counts, cases = evaluate_cases(model, data, spacing=spacing, **load, **prompted)
    swept = []
    if args.prompt_sweep:
        loader = evaluation_loader(data, **load)
        swept = sweep_prompts(model, loader, img_size=args.img_size, seed=args.seed, **how)
    if not is_main():
        return
    classes = distinct(data.classes)
    made = CaseReport(
        facts=facts_of(args, data), classes=classes, counts=counts, cases=cases, seed=args.seed,
        colors=class_colors(data.info["colors"], len(classes)), notes=notes,
        extra={TITLE: sweep_table(swept, classes)} if swept else {},
    )  # fmt: skip
    more = {"held_out": used} | ({"prompt_sweep": sweep_facts(swept, classes)} if swept else {})
    chosen = DataLoader(Subset(data, data.showcase(NUM_OVERLAYS)), batch_size=1)
    overlays = draw_overlays(
        args.output_dir / "overlays", predictions(model, chosen, **prompted),
        classes=classes, colors=made.colors, transpose=data.info["orientation"] == "stored",
    )  # fmt: skip
    lines = save_report(args.output_dir, made, more)
    others = f", with {len(overlays) - 1} more beside it" if len(overlays) > 1 else ""
    print(f"{lines}\noverlay: {overlays[0]}{others}")


def check_fit(
    args: Namespace, data: SliceDataset, members: Sequence[Checkpoint]
) -> tuple[dict[str, Any], list[str]]:
    """How the cases were used in training, for metrics.json, and the notes of the report."""
    notes = check_preparation(members, data.info, override=args.override)
    used = {number for number, _ in data.slices}
    digests = data.store.case_digests(used) if any_record(members) else {}
    held_out, lines = check_held_out(members, digests, override=args.override)
    notes += lines
    spacings = known_spacings(data, args.spacing and tuple(args.spacing))
    if spacings:
        cases = data.store.cases
        flat = {number for number in used if cases[number]["shape"][0] == 1}
        notes += small_tolerances(spacings[n][n in flat :] for n in used)
    for line in notes:
        say(line)
    return held_out, notes


def facts_of(args: Namespace, data: SliceDataset) -> dict[str, Any]:
    """Facts on what was evaluated and how."""
    split = "test" if args.fold is None else f"fold {args.fold}"
    return answers_text(args) | {
        "dataset": args.dataset, "split": split, "slices": len(data), "cases": len(data.case_ids),
        "prompts": PROMPT_SOURCES[args.prompt_mode],
    }  # fmt: skip


def open_data(args: Namespace) -> SliceDataset:
    """The slices to evaluate: the test split, or the held-out cases of --fold."""
    with main_process_first():
        return build_dataset(
            args.dataset, "test" if args.fold is None else "val", data_root=args.data_root,
            img_size=args.img_size, seed=args.seed, val_fraction=args.val_fraction,
            input_mode=args.input, fold=args.fold,
        )  # fmt: skip


def draw_overlays(
    folder: Path,
    shown: Iterable[tuple[dict[str, Any], Tensor, dict[str, Any], Tensor]],
    *,
    classes: list[str],
    colors: list[str],
    transpose: bool,
) -> list[Path]:
    """Save one picture per slice: image with prompts, truth, prediction; returns the paths.

    shown: batches of one slice from `predictions`. `transpose` turns data upright
    that is stored on its side. Pictures of an earlier evaluation in `folder` are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for picture in folder.glob("*.png"):
        picture.unlink()
    paths = []
    for batch, mask, prompts, logits in shown:
        name = batch["id"][0]
        points, boxes = prompts.get("points"), prompts.get("boxes")
        masks = {
            "truth": mask[0].cpu().numpy(),
            "prediction": logits[0].argmax(dim=0).cpu().numpy(),
        }
        file = re.sub(r"[^\w.-]", "_", name)  # an index may name its slices anything
        paths.append(folder / f"{file}.png")
        save_overlay(
            paths[-1],
            batch["image"][0, batch["image"].shape[1] // 2].numpy(),  # 2.5D: the middle slice
            masks,
            classes=classes,
            colors=colors,
            title=name,
            points=points and tuple(value[0].cpu().numpy() for value in points),
            box=None if boxes is None else boxes[0].cpu().numpy(),
            transpose=transpose,
        )
    return paths
