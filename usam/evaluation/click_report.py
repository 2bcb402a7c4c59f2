"""The report of simulated clicks: clicks.csv, metrics.json, clicks.png and a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dataset.files import write_json, write_text
from dataset.text import counted, csv_cell, printable
from usam.evaluation.metrics import distinct
from usam.evaluation.tables import text_table
from usam.runtime.figures import save_figure


def click_names(numbers: Iterable[int]) -> list[str]:
    """The numbers with their noun: "1 click", "3 clicks"."""
    return [counted(number, "click") for number in numbers]


NUM_CLICKS = (1, 3, 5, 10)  # after which an answer is scored
CLICKS = click_names(NUM_CLICKS)
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
    write_scores(folder / "clicks.csv", items, scores, NUM_CLICKS, SCORES, failed)
    classes = {name: spread(scores[where], NUM_CLICKS) for name, where in classes_of(items).items()}
    summary = {
        **facts,
        "objects": len(items),
        "all": spread(scores, NUM_CLICKS),
        "classes": classes,
        "failed": [f"{item.case_id}: {item.name}" for item in failed],
    }
    write_json(folder / "metrics.json", summary, 2, sort_keys=False)
    draw_curves(folder / "clicks.png", summary, NUM_CLICKS)
    return summary


def write_scores(
    path: Path,
    items: Sequence[Item],
    scores: np.ndarray,
    numbers: Sequence[int],
    columns: Sequence[str],
    failed: Sequence[Item],
) -> None:
    """Save scores (objects, clicks, columns) as CSV, a line per object and number of clicks."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["case", "class", "clicks", *columns, "failed"])
    for item, rows in zip(items, scores, strict=True):
        names = csv_cell(item.case_id), csv_cell(item.name)
        for number, values in zip(numbers, rows, strict=True):
            shown = [f"{value:.6f}" for value in values]
            writer.writerow([*names, number, *shown, int(item in failed)])
    write_text(path, table.getvalue())


def classes_of(items: Sequence[Item]) -> dict[str, list[bool]]:
    """Which items are of each class, by its name."""
    by_label = {item.label: item.name for item in items}
    names = distinct(list(by_label.values()))
    return {
        name: [item.label == label for item in items]
        for label, name in zip(by_label, names, strict=True)
    }


def spread(scores: np.ndarray, numbers: Sequence[int]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over objects (n, clicks, 2 or more), by score and clicks."""
    return {
        score: {name: mean_and_std(scores[:, k, s]) for k, name in enumerate(click_names(numbers))}
        for s, score in enumerate(SCORES)
    }


def mean_and_std(values: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over objects (n,)."""
    return {"mean": float(values.mean()), "std": float(values.std())}


def format_clicks(summary: Mapping[str, Any]) -> str:
    """The report as aligned lines: Dice and NSD of each class after each number of clicks."""
    rows = []
    for name, row in [*summary["classes"].items(), ("all", summary["all"])]:
        means = [[row[score][clicks]["mean"] for score in SCORES] for clicks in CLICKS]
        rows.append([name, *(f"{dice:.4f} / {nsd:.4f}" for dice, nsd in means)])
    table = text_table(["class", *CLICKS], rows)
    return "\n".join([f"Dice / NSD at {TOLERANCE:g} mm:", table, *failed_lines(summary)])


def failed_lines(summary: Mapping[str, Any]) -> list[str]:
    """The line that names the objects that failed, if there are any."""
    names = printable(", ".join(summary["failed"]))
    return [f"failed, counted as 0: {names}"] if names else []


def draw_curves(path: Path, summary: Mapping[str, Any], numbers: Sequence[int]) -> None:
    """Dice over the number of clicks as PNG: each class, and all with their spread."""
    keys = click_names(numbers)
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, row in summary["classes"].items():
        means = [row["dice"][key]["mean"] for key in keys]
        axis.plot(numbers, means, marker="o", ms=3, label=printable(name))
    mean = np.array([summary["all"]["dice"][key]["mean"] for key in keys])
    std = np.array([summary["all"]["dice"][key]["std"] for key in keys])
    axis.fill_between(numbers, mean - std, (mean + std).clip(max=1), color="black", alpha=0.08)
    axis.plot(numbers, mean, color="black", lw=2, marker="o", ms=4, label="all (band: 1 SD)")
    axis.set(xlabel="clicks", ylabel="Dice", ylim=(0, 1), xticks=numbers)
    axis.grid(alpha=0.3)
    legend = figure.legend(fontsize=8, loc="outside right center")
    for text in legend.get_texts():
        text.set_parse_math(False)  # names are drawn literally
    save_figure(figure, path, dpi=120)
