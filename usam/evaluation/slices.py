"""What --eval and --merge do: a model or several, the test cases or a fold, and the report."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch.utils.data import DataLoader, Subset

from dataset import SliceDataset
from usam.evaluation import report
from usam.evaluation.case_report import CaseReport, aligned, write_report
from usam.evaluation.cases import evaluate_cases
from usam.evaluation.merge import FOLDERS, check_output, merged
from usam.evaluation.pixels import predictions
from usam.evaluation.prompt_sweep import TITLE, sweep_facts, sweep_prompts, sweep_table
from usam.prediction.overlay import class_colors
from usam.runtime import processes
from usam.runtime.loaders import evaluation_loader
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.weights.inference import answers_text, load_for_inference
from usam.weights.usam import points_are_row_col

NUM_OVERLAYS = 8
COMPARED = ("classes", "window", "orientation", "spacing", "clahe", "crop", "body_crop")


def evaluate(
    args: Namespace, precision: Precision, saved: dict[str, Any], data: SliceDataset
) -> None:
    """Print and save the scores of `--resume` on `data`, pooled and by case, with pictures."""
    model, row_col = load_for_inference(args, precision.device, saved, data.info["fold_digest"])
    warn_of_preparation(args, saved, data)
    how = {"precision": precision, "points_are_row_col": row_col}
    load = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    asked = how | {"prompt_mode": args.prompt_mode}
    spacing = args.spacing and tuple(args.spacing)
    counts, cases = evaluate_cases(model, data, spacing=spacing, **load, **asked)
    swept = []
    if args.prompt_sweep:
        loader = evaluation_loader(data, **load)
        swept = sweep_prompts(model, loader, img_size=args.img_size, seed=args.seed, **how)
    if not processes.is_main():
        return
    facts = answers_text(args) | {
        "dataset": args.dataset, "split": "test" if args.fold is None else f"fold {args.fold}",
        "slices": len(data), "cases": len(data.case_ids),
        "prompts": report.PROMPT_SOURCES[args.prompt_mode],
    }  # fmt: skip
    colors = class_colors(data.info["colors"], len(data.classes))
    extra = {TITLE: sweep_table(swept, data.classes)} if swept else {}
    made = CaseReport(facts, data.classes, colors, counts, cases, args.seed, extra=extra)
    more = made.metrics | ({"prompt_sweep": sweep_facts(swept, data.classes)} if swept else {})
    metrics = report.write_scores(args.output_dir, counts, data.classes, facts, more)
    print(made.text)
    if swept:
        print("\n".join(["all pixels, by source of the prompts:", *aligned(*extra[TITLE])]))
    page = write_report(args.output_dir / "report", made)
    chosen = DataLoader(Subset(data, data.showcase(NUM_OVERLAYS)), batch_size=1)
    overlays = report.draw_overlays(
        args.output_dir / "overlays", predictions(model, chosen, **asked),
        classes=data.classes, colors=colors, transpose=data.info["orientation"] == "stored",
    )  # fmt: skip
    print(f"scores: {metrics}\nreport: {page}")
    others = f", with {len(overlays) - 1} more beside it" if len(overlays) > 1 else ""
    print(f"overlay: {overlays[0]}{others}")


def warn_of_preparation(args: Namespace, saved: dict[str, Any], data: SliceDataset) -> None:
    """Say where `data` is not prepared as the slices that `--resume` was trained on.

    What a checkpoint does not tell is passed over, as the published ones' window and class names.
    """
    published = points_are_row_col(saved)
    told = COMPARED if not published else ("orientation", "clahe")
    found = [
        f"{name} {data.info[name]} (was {before})"
        for name in told
        if name in saved["data"] and data.info[name] != (before := saved["data"][name])
    ]
    if found:
        say(f"warning: {args.resume} was trained on slices prepared otherwise: {'; '.join(found)}")


def merge(args: Namespace) -> None:
    """Print and save one report of the cases in all folders of --merge."""
    if not processes.is_main():
        return
    check_output(args.merge, args.output_dir)
    made = merged(args.merge, args.seed)
    metrics = report.write_scores(
        args.output_dir, made.counts, list(made.classes), made.facts, made.metrics
    )
    print("\n".join([made.text, *aligned(*made.extra[FOLDERS])]))
    print(f"scores: {metrics}\nreport: {write_report(args.output_dir / 'report', made)}")
