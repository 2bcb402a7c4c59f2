"""The files of an evaluation: metrics.json, and report/ with tables, pictures and a page."""

from __future__ import annotations

import csv
import io
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from dataset.files import atomic_write, file_digest, write_json, write_text
from dataset.text import counted, csv_cell, printable
from usam.evaluation.case_metrics import METRICS
from usam.evaluation.metrics import ClassCounts
from usam.evaluation.report_tables import (
    CaseReport,
    box_values,
    case_rows,
    case_table,
    details,
    overview,
    pooled_table,
    rules,
    unit_of,
)
from usam.evaluation.tables import markdown_table, text_table
from usam.runtime.figures import draw_box_plots

LESIONS = ("lesions", "lesions_found", "false_lesions")
VOLUMES = ("true_volume", "predicted_volume")
COLUMNS = ("case", "slices", "class", "empty", *METRICS, *LESIONS, *VOLUMES)


def save_report(folder: Path, report: CaseReport, more: Mapping[str, Any] | None = None) -> str:
    """Print the scores, write report/ and, last, metrics.json; returns lines naming the files.

    more: further keys of metrics.json, which also holds the digest of report/cases.csv: after an
    interruption between the two, --merge refuses the folder.
    """
    page = write_report(folder / "report", report)
    digest = {"cases_digest": file_digest(page.with_name("cases.csv"))}
    metrics = write_scores(
        folder, report.counts, report.classes, report.facts, report.metrics | digest | (more or {})
    )
    print(report.text)
    for title, table in report.extra.items():
        print(f"{title}:\n{text_table(*table)}")
    return f"scores: {metrics}\nreport: {page}"


def write_scores(
    folder: Path,
    counts: ClassCounts,
    classes: list[str],
    facts: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Print the scores of `counts`, save them with `facts` as metrics.json; returns its path.

    facts: what was evaluated, on what and with which prompts. The scores of the published
    protocol, which leaves out slices without any true foreground, stand beside those of all
    slices. more: further keys of metrics.json.
    """
    summary = counts.summary(classes)
    published = counts.summary(classes, foreground_only=True)
    where = printable(facts["checkpoint"])
    print(
        f"{where} on {counted(facts['slices'], facts['split'] + ' slice')} of "
        f"{counted(facts['cases'], 'case')} of {facts['dataset']}; prompts: {facts['prompts']}; "
        "Dice and IoU of all pixels"
    )
    print(text_table(*pooled_table(summary)))
    if summary["absent"]:
        names = ", ".join(summary["absent"])
        print(f"neither labelled nor predicted, left out of the means: {printable(names)}")
    if published["mean_dice"] is not None:
        print(
            f"slices with foreground only (the published protocol): mean Dice "
            f"{published['mean_dice']:.4f}, IoU {published['mean_iou']:.4f}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    scores = {**facts, **summary, "foreground_slices_only": published, **(more or {})}
    write_json(path, scores, 2, sort_keys=False)
    return path


def write_report(folder: Path, report: CaseReport) -> Path:
    """Write cases.csv, classes.md, boxes.png, worst/*.png, report.html; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = cases_csv(report)
    write_text(folder / "cases.csv", cases)
    write_text(folder / "classes.md", markdown(report))
    colors = dict(zip(report.classes, report.colors, strict=True))
    draw_box_plots(folder / "boxes.png", box_values(report), colors)
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
    """File name of the picture of the case with this rank among the worst, from 1."""
    return re.sub(r"[^\w.-]", "_", f"{place}_{case}") + ".png"  # a case may have any name


def cases_csv(report: CaseReport) -> str:
    """One line per case and class; scores in full precision, empty if undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["from"] if report.sources else []), *COLUMNS, "unit"])
    unit = unit_of(report.cases.in_mm)
    for case, name, row in case_rows(report):
        slices = report.cases.num_slices[case]
        values = row | {"case": csv_cell(case), "slices": slices, "class": csv_cell(name)}
        source = [csv_cell(report.sources[case])] if report.sources else []
        writer.writerow([*source, *(values[column] for column in COLUMNS), unit])
    return text.getvalue()


def markdown(report: CaseReport) -> str:
    """classes.md: what was evaluated, classes by metric, each class in full, definitions."""
    facts = [f"- {name}: {printable(value)}" for name, value in report.facts.items()]
    pooled = report.counts.summary(report.classes)
    notes = ["## Notes", "\n".join(f"- {note}" for note in report.notes)] if report.notes else []
    blocks = ["# Scores by case", "\n".join(facts), *notes, "Mean ± standard deviation over cases."]
    blocks.append(markdown_table(*overview(report)))
    for name in report.summary:
        blocks += [f"## {printable(name)}", markdown_table(*details(report, name))]
    blocks += ["## All pixels of all slices", markdown_table(*pooled_table(pooled))]
    for title, table in report.extra.items():
        blocks += [f"## {title}", markdown_table(*table)]
    blocks += ["## Rules", "\n".join(f"- {rule}" for rule in rules(report.cases.in_mm))]
    return "\n\n".join(blocks) + "\n"


def web_page(report: CaseReport, cases: str, boxes: bytes) -> str:
    """report.html: the whole report in one file, without scripts or external links."""
    worst = report.cases.worst
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return pages.get_template("report.html.j2").render(
        facts=report.facts,
        notes=report.notes,
        overview=overview(report),
        pooled=pooled_table(report.counts.summary(report.classes)),
        extra=report.extra,
        boxes=b64encode(boxes).decode(),
        worst=[one | {key: printable(one[key]) for key in ("case", "slice")} for one in worst],
        details={printable(name): details(report, name) for name in report.summary},
        cases=case_table(report),
        csv=b64encode(cases.encode()).decode(),
        rules=rules(report.cases.in_mm),
    )
