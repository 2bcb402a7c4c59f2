"""--eval for U-SAM: the test slices or those of a fold, one model or several, and the report."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dataset import SliceDataset, build_dataset
from dataset.palette import class_colors
from usam.evaluation import report
from usam.evaluation.cases import evaluate_cases
from usam.evaluation.metrics import distinct
from usam.evaluation.pixels import PROMPT_SOURCES, predictions
from usam.evaluation.prompt_sweep import TITLE, sweep_facts, sweep_prompts, sweep_table
from usam.evaluation.report_tables import CaseReport
from usam.evaluation.tables import text_table
from usam.runtime.figures import save_overlay
from usam.runtime.loaders import evaluation_loader
from usam.runtime.precision import Precision
from usam.runtime.processes import is_main, main_process_first, say
from usam.weights.inference import answers_text, load_for_inference
from usam.weights.usam import points_are_row_col

NUM_OVERLAYS = 8
COMPARED = ("classes", "window", "orientation", "spacing", "clahe", "crop", "body_crop")


def evaluate(args: Namespace, precision: Precision, saved: dict[str, Any]) -> None:
    """Print and save the scores of `--resume`, pooled and by case, with pictures."""
    data = open_data(args)
    warn_of_preparation(args, saved, data)
    model, row_col = load_for_inference(args, precision.device, saved, data.info["fold_digest"])
    how = {"precision": precision, "points_are_row_col": row_col}
    load = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    prompted = how | {"prompt_mode": args.prompt_mode}
    spacing = args.spacing and tuple(args.spacing)
    counts, cases = evaluate_cases(model, data, spacing=spacing, **load, **prompted)
    classes, swept = distinct(data.classes), []
    if args.prompt_sweep:
        loader = evaluation_loader(data, **load)
        swept = sweep_prompts(model, loader, img_size=args.img_size, seed=args.seed, **how)
    if not is_main():
        return
    facts = answers_text(args) | {
        "dataset": args.dataset, "split": "test" if args.fold is None else f"fold {args.fold}",
        "slices": len(data), "cases": len(data.case_ids),
        "prompts": PROMPT_SOURCES[args.prompt_mode],
    }  # fmt: skip
    colors = class_colors(data.info["colors"], len(classes))
    extra = {TITLE: sweep_table(swept, classes)} if swept else {}
    made = CaseReport(facts, classes, colors, counts, cases, args.seed, extra=extra)
    more = made.metrics | ({"prompt_sweep": sweep_facts(swept, classes)} if swept else {})
    metrics = report.write_scores(args.output_dir, counts, classes, facts, more)
    print(made.text)
    if swept:
        print(f"all pixels, by source of the prompts:\n{text_table(*extra[TITLE])}")
    page = report.write_report(args.output_dir / "report", made)
    chosen = DataLoader(Subset(data, data.showcase(NUM_OVERLAYS)), batch_size=1)
    overlays = draw_overlays(
        args.output_dir / "overlays", predictions(model, chosen, **prompted),
        classes=classes, colors=colors, transpose=data.info["orientation"] == "stored",
    )  # fmt: skip
    print(f"scores: {metrics}\nreport: {page}")
    others = f", with {len(overlays) - 1} more beside it" if len(overlays) > 1 else ""
    print(f"overlay: {overlays[0]}{others}")


def open_data(args: Namespace) -> SliceDataset:
    """The slices to evaluate: the test split, or the held-out cases of --fold."""
    with main_process_first():
        return build_dataset(
            args.dataset, "test" if args.fold is None else "val", data_root=args.data_root,
            img_size=args.img_size, seed=args.seed, val_fraction=args.val_fraction,
            input_mode=args.input, fold=args.fold,
        )  # fmt: skip


def warn_of_preparation(args: Namespace, saved: dict[str, Any], data: SliceDataset) -> None:
    """Say where `data` is prepared in another way than the slices `--resume` was trained on.

    What a checkpoint does not hold is not compared, as the published ones' window and class names.
    Raises ValueError if the number of classes differs.
    """
    trained = saved["data"]
    if len(trained["classes"]) != len(data.classes):
        raise ValueError(
            f"{args.resume} was trained on {len(trained['classes'])} classes, "
            f"--dataset {args.dataset} has {len(data.classes)}"
        )
    published = points_are_row_col(saved)
    found = [
        f"{name} {data.info[name]} (was {before})"
        for name in (COMPARED if not published else ("orientation", "clahe"))
        if name in trained and data.info[name] != (before := trained[name])
    ]
    if found:
        say(f"warning: {args.resume} was trained on differently preprocessed slices: "
            f"{'; '.join(found)}")  # fmt: skip


def draw_overlays(
    folder: Path,
    shown: Iterable[tuple[dict[str, Any], Tensor, dict[str, Any], Tensor]],
    *,
    classes: list[str],
    colors: list[str],
    transpose: bool,
) -> list[Path]:
    """One picture a slice: image with its prompts, truth, prediction; the files' paths.

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
