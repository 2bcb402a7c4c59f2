"""The report of an evaluation: report/ with the cases, tables, pictures and a page of them all.

u-sam.py writes one after --eval and, from several, one of --merge.
"""

from __future__ import annotations

import csv
import io
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dataset.files import atomic_write, write_text
from usam.evaluation import html_report as html
from usam.evaluation.case_metrics import MEAN, METRICS, RESAMPLES, Row, summarize
from usam.evaluation.cases import CaseScores
from usam.evaluation.metrics import ClassCounts
from usam.runtime.figures import draw_box_plots

LESIONS = ("lesions", "lesions_found", "false_lesions")
VOLUMES = ("true_volume", "predicted_volume")
COLUMNS = ("case", "slices", "class", "empty", *METRICS, *LESIONS, *VOLUMES)
BOXES = ("dice", "iou", "hd95", "nsd_1", "nsd_2", "volume_difference")
MOST_DECIMALS = 3  # in the table of all classes
DETAILS = ("n", "mean", "SD", "median", "95 % interval of the mean")


@dataclass(frozen=True)
class CaseReport:
    """What a report is made of.

    facts: what was evaluated and how, by name. classes, colors: by label. counts: of all pixels.
    seed: of the intervals. sources: by case, the folder it comes from, where there are several.
    extra: further tables, by title (head, rows).
    """

    facts: Mapping[str, Any]
    classes: Sequence[str]
    colors: Sequence[str]
    counts: ClassCounts
    cases: CaseScores
    seed: int
    sources: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=dict)

    @cached_property
    def summary(self) -> dict[str, dict[str, Any]]:
        """By class and metric, what the cases say together; see `summarize`."""
        return summarize(self.cases.rows, self.classes, self.seed)

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds beside the pooled scores; --merge reads it again."""
        return {
            "per_case": {
                "unit": unit_of(self.cases.in_mm),
                "classes": self.summary,
                "worst": [
                    {key: one[key] for key in ("case", "slice", "dice")} for one in self.cases.worst
                ],
            },
            "counts": self.counts.tensors.tolist(),
            "colors": list(self.colors),
        }

    @property
    def text(self) -> str:
        """Means over cases as aligned lines, for the terminal."""
        head, rows = overview(self, ("dice", "iou", "hd95", "nsd_1", "nsd_2", "detection_rate"))
        title = f"by case ({len(self.cases.rows)} cases), mean ± standard deviation; prompts: "
        return "\n".join([title + self.facts["prompts"], *aligned(head, rows)])


def rules(in_mm: bool) -> list[str]:
    """How figures of cases are defined, and what becomes of empty masks; plain sentences."""
    unit, volume = ("mm", "ml") if in_mm else ("pixels", "voxels")
    lines = [
        "A case is a volume: all its evaluated slices, at the size they are stored in. Predictions "
        "are resampled to that size first. Slices left out of the evaluation count as empty.",
        "Absent, neither true nor predicted: the class has no figures in this case, and is left "
        "out of all means (n says how many cases remain).",
        "Missed, true but not predicted, and false alarm, predicted but not true: Dice, IoU and "
        f"NSD are 0, HD95 is the longest distance in the case, in {unit}, corner to corner.",
        "HD95: the distance within which 95 % of either surface lies from the other. NSD at t: the "
        f"share of both surfaces that lies within t {unit} of the other. Surfaces as in DeepMind's "
        "surface-distance (Nikolov et al. 2018), computed by MONAI.",
        f"Volume difference: predicted less true, in {volume} and in per cent of the true volume; "
        "without a true volume there is no percentage.",
        "Lesions: connected pieces of the truth (26 neighbours), of every class. One is detected "
        "if any voxel of it is predicted as its class; a case without any has no detection rate. "
        "False lesions: connected pieces of the prediction that touch no truth of their class.",
        f"Intervals: 95 % of the means of {RESAMPLES:,} sets of cases drawn with replacement.",
    ]
    if not in_mm:
        lines.insert(0, "The data hold no spacing (give it with --spacing): distances are in "
                     "pixels, with slices one pixel apart, and volumes in voxels.")  # fmt: skip
    return lines


def unit_of(in_mm: bool) -> str:
    """The units of distances and volumes."""
    return "mm, ml" if in_mm else "pixels, voxels"


def title_of(metric: str, in_mm: bool) -> str:
    """A metric's name with its unit."""
    units = {"distance": ("pixels", "mm"), "volume": ("voxels", "ml"), "percent": ("%", "%")}
    title, unit, _ = METRICS[metric]
    if metric.startswith("nsd"):
        return f"{title} {units['distance'][in_mm]}"
    return title if unit is None else f"{title} ({units[unit][in_mm]})"


def write_report(folder: Path, report: CaseReport) -> Path:
    """Write cases.csv, classes.md, boxes.png, worst/*.png and report.html; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = cases_csv(report)
    write_text(folder / "cases.csv", cases)
    write_text(folder / "classes.md", markdown(report))
    draw_box_plots(
        folder / "boxes.png",
        box_values(report),
        dict(zip(report.classes, report.colors, strict=True)),
    )
    (folder / "worst").mkdir(exist_ok=True)
    for old in (folder / "worst").glob("*.png"):
        old.unlink()
    for place, one in enumerate(report.cases.worst, start=1):
        path = folder / "worst" / worst_file(place, one["case"])
        with atomic_write(path) as scratch:
            scratch.write_bytes(b64decode(one["png"]))
    page = folder / "report.html"
    write_text(page, web_page(report, cases, (folder / "boxes.png").read_bytes()))
    return page


def worst_file(place: int, case: str) -> str:
    """The name of the picture of the case in this place among the worst, from 1."""
    return re.sub(r"[^\w.-]", "_", f"{place}_{case}") + ".png"  # a case may have any name


def cases_csv(report: CaseReport) -> str:
    """A line for each case and class, figures as exact as they are, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["from"] if report.sources else []), *COLUMNS, "unit"])
    unit = unit_of(report.cases.in_mm)
    for case, name, row in case_rows(report):
        values = {"case": case, "slices": report.cases.num_slices[case], "class": name} | row
        source = [report.sources[case]] if report.sources else []
        writer.writerow([*source, *(values[column] for column in COLUMNS), unit])
    return text.getvalue()


def case_rows(report: CaseReport) -> Iterator[tuple[str, str, Row]]:
    """Case, class name and figures, case after case."""
    for case, rows in report.cases.rows.items():
        for name, row in zip(report.classes[1:], rows, strict=True):
            yield case, name, row


def box_values(report: CaseReport) -> dict[str, dict[str, list[float]]]:
    """Values of all cases by metric (its title) and class."""
    found: dict[str, dict[str, list[float]]] = {}
    for metric in BOXES:
        by_class: dict[str, list[float]] = {name: [] for name in report.classes[1:]}
        for _, name, row in case_rows(report):
            if row[metric] is not None:
                by_class[name].append(row[metric])
        found[title_of(metric, report.cases.in_mm)] = by_class
    return found


# ------------------------------------------------------------------ tables


def overview(
    report: CaseReport, metrics: Iterable[str] = tuple(METRICS)
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of classes: mean and standard deviation of each metric."""
    head = ["class", *(title_of(metric, report.cases.in_mm) for metric in metrics), "lesions found"]
    rows = []
    for name, figures in report.summary.items():
        cells = [
            with_spread(figures[metric], min(METRICS[metric].decimals, 3)) for metric in metrics
        ]
        rows.append([name, *cells, lesions_text(figures["lesions"])])
    return head, rows


def details(report: CaseReport, name: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one class's table: n, mean, SD, median and interval of each metric."""
    rows = []
    for metric in METRICS:
        found, decimals = report.summary[name][metric], METRICS[metric].decimals
        values = [number(found[key], decimals) for key in ("mean", "std", "median")]
        interval = "-"
        if found["low"] is not None:
            interval = " to ".join(number(found[key], decimals) for key in ("low", "high"))
        rows.append([title_of(metric, report.cases.in_mm), str(found["n"]), *values, interval])
    return ["metric", *DETAILS], rows


def with_spread(figures: Mapping[str, Any], decimals: int) -> str:
    """Mean and standard deviation."""
    spread = "" if figures["std"] is None else f" ± {number(figures['std'], decimals)}"
    return number(figures["mean"], decimals) + spread


def lesions_text(lesions: Mapping[str, int]) -> str:
    """How many lesions were found, and how many false ones."""
    found, total, false = (lesions[key] for key in ("lesions_found", "lesions", "false_lesions"))
    return f"{found} of {total}, {false} false"


def number(value: float | None, decimals: int) -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"  # no -0.0


def pooled_table(report: CaseReport) -> tuple[list[str], list[list[str]]]:
    """Head and rows of Dice and IoU over all pixels of all slices."""
    pooled = report.counts.summary(report.classes)
    rows = [[name, number(value, 4), number(pooled["iou"][name], 4)]
            for name, value in pooled["dice"].items()]  # fmt: skip
    rows.append([MEAN, number(pooled["mean_dice"], 4), number(pooled["mean_iou"], 4)])
    return ["class", "Dice", "IoU"], rows


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for the terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in (head, *rows)
    ]


def markdown(report: CaseReport) -> str:
    """classes.md: what was evaluated, classes by metric, then each class in full, and the rules."""
    lines = ["# Scores by case", ""]
    lines += [f"- {name}: {value}" for name, value in report.facts.items()]
    lines += ["", "Mean ± standard deviation over cases.", "", *markdown_table(*overview(report))]
    for name in report.summary:
        lines += ["", f"## {name}", "", *markdown_table(*details(report, name))]
    lines += ["", "## All pixels of all slices", "", *markdown_table(*pooled_table(report))]
    for title, (head, rows) in report.extra.items():
        lines += ["", f"## {title}", "", *markdown_table(head, rows)]
    lines += ["", "## Rules", "", *(f"- {rule}" for rule in rules(report.cases.in_mm))]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; names may hold anything."""
    bars = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    texts = ["| " + " | ".join(row) + " |" for row in bars]
    return [texts[0], "| --- |" + " ---: |" * (len(head) - 1), *texts[1:]]


def web_page(report: CaseReport, cases: str, boxes: bytes) -> str:
    """report.html: all of the report in one file."""
    in_mm, facts = report.cases.in_mm, report.facts
    head = f"{facts['dataset']}, {facts['split']}: {facts['cases']} cases, {facts['slices']} slices"
    each = [block for name in report.summary
            for block in (html.heading(name), html.table(*details(report, name)))]  # fmt: skip
    worst = [
        html.picture(b64decode(one["png"]), f"{one['case']}, mean Dice {one['dice']:.4f}; shown: "
                     f"{one['slice']}, its slice with most wrong pixels")
        for one in report.cases.worst
    ]  # fmt: skip
    sections = [
        html.section("What was evaluated", html.facts(facts)),
        html.section("Scores by case", html.paragraph("Mean ± standard deviation over cases."),
                     html.table(*overview(report))),
        html.section("All pixels of all slices", html.table(*pooled_table(report))),
        *(html.section(title, html.table(*table)) for title, table in report.extra.items()),
        html.section("Distribution over cases", html.picture(
            boxes, "Boxes: quartiles and median; whiskers: the last case within 1.5 boxes; "
            "points: cases")),
        html.section("Worst cases", html.paragraph(
            "By mean Dice over the classes; cut to what is labelled."), *worst),
        html.section("Each class", *each),
        html.section("Each case", html.table(*case_table(report)),
                     html.download("cases.csv", cases.encode(), "text/csv")),
        html.section("Rules", html.items(rules(in_mm))),
    ]  # fmt: skip
    return html.page("Segmentation report", head, sections)


def case_table(report: CaseReport) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of all cases and classes."""
    head = ["case", "class", *(title_of(metric, report.cases.in_mm) for metric in METRICS),
            "lesions found", ""]  # fmt: skip
    rows = []
    for case, name, row in case_rows(report):
        figures = [number(row[metric], METRICS[metric].decimals) for metric in METRICS]
        rows.append([case, name, *figures, lesions_text(row), row["empty"]])
    return head, rows
