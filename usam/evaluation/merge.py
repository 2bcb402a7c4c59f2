"""--merge: one report of several evaluations, such as the folds of a cross-validation."""

from __future__ import annotations

import csv
import json
import re
from argparse import Namespace
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dataset.files import file_digest
from usam.evaluation.case_metrics import MEAN, METRICS, Row, describe, mean_row
from usam.evaluation.cases import NUM_WORST, CaseScores
from usam.evaluation.metrics import ClassCounts
from usam.evaluation.report import LESIONS, VOLUMES, save_report, worst_file
from usam.evaluation.report_tables import CaseReport, title_of, with_spread
from usam.evaluation.tables import Table, number
from usam.runtime.processes import is_main

FOLDERS = "Each folder"
SAME = ("dataset", "prompts", "views")  # keys of metrics.json that must be equal
SHOWN = ("dice", "iou", "hd95", "nsd_1", "nsd_2")


class Evaluated(NamedTuple):
    """The content of an --eval folder: metrics.json, and the rows of report/cases.csv by case."""

    folder: Path
    metrics: dict[str, Any]
    rows: dict[str, list[Row]]
    num_slices: dict[str, int]

    @property
    def classes(self) -> list[str]:
        """Class names by label id."""
        return list(self.metrics["dice"])


def merge(args: Namespace) -> None:
    """Print and save one report of the cases in all folders of --merge."""
    if not is_main():
        return
    check_output(args.merge, args.output_dir)
    made = merged(args.merge, args.seed)
    print(save_report(args.output_dir, made))


def merged(folders: Sequence[Path], seed: int) -> CaseReport:
    """The report of all cases of `folders`, each case in one of them only.

    Raises FileNotFoundError where a folder holds no report, ValueError where classes, units or
    SAME differ, or a case occurs twice.
    """
    parts = [read_evaluated(folder) for folder in folders]
    sources = check_parts(parts)
    counts = ClassCounts(len(parts[0].classes))
    counts.tensors += sum(torch.tensor(part.metrics["counts"]) for part in parts)
    cases = CaseScores(
        rows={case: rows for part in parts for case, rows in part.rows.items()},
        num_slices={case: n for part in parts for case, n in part.num_slices.items()},
        in_mm=parts[0].metrics["per_case"]["unit"].startswith("mm"),
        worst=worst_of(parts),
    )
    return CaseReport(
        facts=joined_facts([part.metrics for part in parts]),
        classes=parts[0].classes,
        colors=parts[0].metrics["colors"],
        counts=counts,
        cases=cases,
        seed=seed,
        sources=sources,
        extra={FOLDERS: folder_table(parts, cases.in_mm, seed)},
        notes=[f"{one.folder}: {note}" for one in parts for note in one.metrics.get("notes", ())],
    )


def check_output(folders: Sequence[Path], output: Path) -> None:
    """Raises ValueError if `output` is one of `folders`, whose report would be overwritten."""
    for folder in folders:
        if folder.resolve() == output.resolve():
            raise ValueError(
                f"--merge: --output_dir {output} is {folder}, whose report would be overwritten; "
                "name another folder"
            )


def read_evaluated(folder: Path) -> Evaluated:
    """The content of an --eval folder; FileNotFoundError or ValueError if it is incomplete."""
    table = folder / "report" / "cases.csv"
    for path in (folder / "metrics.json", table):
        if not path.is_file():
            raise FileNotFoundError(f"--merge: no {path}; name the --output_dir of an --eval")
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        rows: dict[str, list[Row]] = {}
        num_slices = {}
        with table.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                case = re.sub("^'(?=[=+@-])", "", line["case"])  # see `csv_cell`
                rows.setdefault(case, []).append(_row(line))
                num_slices[case] = int(line["slices"])
        for key in ("counts", "colors", "per_case", "dice"):
            metrics[key]
        if metrics.get("cases_digest") not in (None, file_digest(table)):
            raise ValueError("metrics.json and report/cases.csv are of different evaluations")
    except (ValueError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"--merge: {folder} holds no complete report ({reason}); run --eval again"
        ) from None
    return Evaluated(folder, metrics, rows, num_slices)


def _row(line: Mapping[str, str]) -> Row:
    row: Row = {name: float(line[name]) if line[name] else None for name in (*METRICS, *VOLUMES)}
    return row | {name: int(line[name]) for name in LESIONS} | {"empty": line["empty"]}


def check_parts(parts: Sequence[Evaluated]) -> dict[str, str]:
    """The folder of each case; raises ValueError if `parts` cannot be merged."""
    first, sources = parts[0], {}
    for part in parts:
        for what, ours, theirs in (
            ("classes", first.classes, part.classes),
            ("units", first.metrics["per_case"]["unit"], part.metrics["per_case"]["unit"]),
            *((key, *(one.metrics.get(key, "none") for one in (first, part))) for key in SAME),
        ):
            if ours != theirs:
                raise ValueError(
                    f"--merge: {part.folder} has {what} {theirs}, {first.folder} has {ours}"
                )
        for case in part.rows:
            if case in sources:
                raise ValueError(
                    f"--merge: case {case} is in {sources[case]} and in {part.folder}; "
                    "each case may occur once"
                )
            sources[case] = str(part.folder)
    return sources


def joined_facts(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of all parts together: numbers of slices and cases summed, other values listed."""
    names = ("checkpoint", "dataset", "split", "slices", "cases", "prompts", "views")
    found: dict[str, Any] = {}
    for name in names:
        values = [one[name] for one in metrics if name in one]
        if name in ("slices", "cases"):
            found[name] = sum(values)
        elif values:
            found[name] = ", ".join(dict.fromkeys(map(str, values)))
    return found


def worst_of(parts: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """The worst cases of all parts whose pictures still exist."""
    found = []
    for part in parts:
        for place, one in enumerate(part.metrics["per_case"]["worst"], start=1):
            path = part.folder / "report" / "worst" / worst_file(place, one["case"])
            if path.is_file():
                found.append({**one, "png": b64encode(path.read_bytes()).decode()})
    return sorted(found, key=lambda one: (one["dice"], one["case"]))[:NUM_WORST]


def folder_table(parts: Sequence[Evaluated], in_mm: bool, seed: int) -> Table:
    """Table header and rows: each folder's means over cases, then mean and SD over folders."""
    head = ["folder", "cases", *(title_of(metric, in_mm) for metric in SHOWN)]
    rows, means = [], []
    for part in parts:
        of_cases = [mean_row(of_classes) for of_classes in part.rows.values()]
        found = {
            name: describe([row[name] for row in of_cases if row[name] is not None], seed)
            for name in SHOWN
        }
        means.append({name: figures["mean"] for name, figures in found.items()})
        cells = [with_spread(found[name], METRICS[name].decimals) for name in SHOWN]
        rows.append([f"{part.folder}, {MEAN}", str(len(part.rows)), *cells])
    last = []
    for name in SHOWN:
        known = describe([one[name] for one in means if one[name] is not None], seed)
        last.append(with_spread(known, METRICS[name].decimals))
    total = number(sum(len(part.rows) for part in parts), 0)
    return head, [*rows, ["mean ± standard deviation over folders", total, *last]]
