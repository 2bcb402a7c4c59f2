"""The report of simulated clicks: clicks.csv, metrics.json, clicks.png and a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dataset.files import write_json, write_text
from dataset.text import counted, csv_cell, printable
from usam.evaluation.metrics import distinct
from usam.evaluation.tables import text_table
from usam.runtime.figures import save_figure

NUM_CLICKS = (1, 3, 5, 10)  # after which an answer is scored
CLICKS = [counted(number, "click") for number in NUM_CLICKS]
TOLERANCE = 1.0  # mm, of the NSD
SCORES = ("dice", "nsd")


class Item(NamedTuple):
    """One object to segment: its case by number and name, its class by id and name."""

    case: int
    case_id: str
    label: int
    name: str


def write_report(
    folder: Path,
    items: Sequence[Item],
    scores: np.ndarray,
    *,
    failed: Sequence[Item],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Save clicks.csv, metrics.json, clicks.png in `folder`; returns the content of metrics.json.

    scores (objects, clicks, 2) of `evaluate_objects`; facts: what was evaluated and how.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["case", "class", "clicks", *SCORES, "failed"])
    for item, rows in zip(items, scores, strict=True):
        names = csv_cell(item.case_id), csv_cell(item.name)
        for number, values in zip(NUM_CLICKS, rows, strict=True):
            shown = [f"{value:.6f}" for value in values]
            writer.writerow([*names, number, *shown, int(item in failed)])
    write_text(folder / "clicks.csv", table.getvalue())
    by_label = {item.label: item.name for item in items}
    classes = {
        name: spread(scores[[item.label == label for item in items]])
        for label, name in zip(by_label, distinct(list(by_label.values())), strict=True)
    }
    summary = {
        **facts,
        "objects": len(items),
        "all": spread(scores),
        "classes": classes,
        "failed": [f"{item.case_id}: {item.name}" for item in failed],
    }
    write_json(folder / "metrics.json", summary, 2, sort_keys=False)
    draw_curves(folder / "clicks.png", summary)
    return summary


def spread(scores: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over objects (n, clicks, 2), by score and number of clicks."""
    return {
        score: {
            name: {"mean": float(scores[:, k, s].mean()), "std": float(scores[:, k, s].std())}
            for k, name in enumerate(CLICKS)
        }
        for s, score in enumerate(SCORES)
    }


def format_clicks(summary: Mapping[str, Any]) -> str:
    """The report as aligned lines: Dice and NSD of each class after each number of clicks."""
    rows = []
    for name, row in [*summary["classes"].items(), ("all", summary["all"])]:
        means = [[row[score][clicks]["mean"] for score in SCORES] for clicks in CLICKS]
        rows.append([name, *(f"{dice:.4f} / {nsd:.4f}" for dice, nsd in means)])
    table = text_table(["class", *CLICKS], rows)
    lines = [f"Dice / NSD at {TOLERANCE:g} mm:", table]
    if summary["failed"]:
        lines.append(f"failed, counted as 0: {printable(', '.join(summary['failed']))}")
    return "\n".join(lines)


def draw_curves(path: Path, summary: Mapping[str, Any]) -> None:
    """Dice over the number of clicks as PNG: each class, and all with their spread."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, row in summary["classes"].items():
        means = [row["dice"][key]["mean"] for key in CLICKS]
        axis.plot(NUM_CLICKS, means, marker="o", ms=3, label=printable(name))
    mean = np.array([summary["all"]["dice"][key]["mean"] for key in CLICKS])
    std = np.array([summary["all"]["dice"][key]["std"] for key in CLICKS])
    axis.fill_between(NUM_CLICKS, mean - std, (mean + std).clip(max=1), color="black", alpha=0.08)
    axis.plot(NUM_CLICKS, mean, color="black", lw=2, marker="o", ms=4, label="all (band: 1 SD)")
    axis.set(xlabel="clicks", ylabel="Dice", ylim=(0, 1), xticks=NUM_CLICKS)
    axis.grid(alpha=0.3)
    legend = figure.legend(fontsize=8, loc="outside right center")
    for text in legend.get_texts():
        text.set_parse_math(False)  # names are drawn literally
    save_figure(figure, path, dpi=120)
