"""Tables, definitions and titles of a report, for the page, classes.md and the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dataset.text import counted, printable
from usam.evaluation.case_metrics import MEAN, METRICS, RESAMPLES, Row, summarize
from usam.evaluation.cases import CaseScores
from usam.evaluation.metrics import ClassCounts
from usam.evaluation.tables import Table, number, text_table

BOXES = ("dice", "iou", "hd95", "nsd_1", "nsd_2", "volume_difference")
PRINTED = ("dice", "iou", "hd95", "nsd_1", "nsd_2", "detection_rate")
DETAILS = ("n", "mean", "SD", "median", "95 % interval of the mean")


@dataclass(frozen=True)
class CaseReport:
    """The content of a report.

    facts: what was evaluated and how, by name. classes, colors: by label; class names are
    distinct. counts: of all pixels. seed: of the intervals. sources: by case, the folder it comes
    from, where there are several. extra: further tables by title. notes: sentences on how the
    scores may be read.
    """

    facts: Mapping[str, Any]
    classes: list[str]
    colors: list[str]
    counts: ClassCounts
    cases: CaseScores
    seed: int
    sources: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Table] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @cached_property
    def summary(self) -> dict[str, dict[str, Any]]:
        """Statistics over the cases by class and metric; see `summarize`."""
        return summarize(self.cases.rows, self.classes, self.seed)

    @property
    def metrics(self) -> dict[str, Any]:
        """The keys of metrics.json besides the pooled scores; --merge reads them."""
        worst = [{key: one[key] for key in ("case", "slice", "dice")} for one in self.cases.worst]
        unit = unit_of(self.cases.in_mm)
        return {
            "per_case": {"unit": unit, "classes": self.summary, "worst": worst},
            "counts": self.counts.tensors.tolist(),
            "colors": self.colors,
            "notes": [*self.notes],
        }

    @property
    def text(self) -> str:
        """Means over cases as aligned lines for the terminal."""
        return (
            f"by case ({counted(len(self.cases.rows), 'case')}), mean ± standard deviation; "
            f"prompts: {self.facts['prompts']}\n{text_table(*overview(self, PRINTED))}"
        )


def rules(in_mm: bool) -> list[str]:
    """Sentences that define the scores of cases and how empty masks are scored."""
    unit, volume = ("mm", "ml") if in_mm else ("pixels", "voxels")
    lines = [
        "A case is a volume: all its evaluated slices, at the size they are stored in. Predictions "
        "are resampled to that size first. Slices left out of the evaluation count as empty.",
        "Absent, neither true nor predicted: the class has no scores in this case, and is left "
        "out of all means (n says how many cases remain).",
        "Missed, true but not predicted, and false alarm, predicted but not true: Dice, IoU and "
        f"NSD are 0, HD95 is the longest distance in the case, in {unit}, corner to corner.",
        "HD95: the distance within which 95 % of either surface lies from the other. NSD at t: the "
        f"share of both surfaces that lies within t {unit} of the other. Surfaces as in Nikolov et "
        "al. 2018, computed by DeepMind's surface-distance. In a case of one slice they are the "
        "contours.",
        f"Volume difference: predicted minus true, in {volume} and in per cent of the true volume; "
        "without a true volume there is no percentage.",
        "Lesions: connected pieces of the truth (26 neighbours), of every class. One is detected "
        "if any voxel of it is predicted as its class; a case without any has no detection rate. "
        "False lesions: connected pieces of the prediction that touch no truth of their class.",
        f"Intervals: 95 % of the means of {RESAMPLES:,} sets of cases drawn with replacement.",
    ]
    if not in_mm:
        lines.insert(0, "The data have no spacing (give it with --spacing): distances are in "
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


def case_rows(report: CaseReport) -> Iterator[tuple[str, str, Row]]:
    """Case, class name and scores, case after case."""
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


def overview(report: CaseReport, metrics: Iterable[str] = tuple(METRICS)) -> Table:
    """The table of classes: mean and standard deviation of each metric."""
    head = ["class", *(title_of(metric, report.cases.in_mm) for metric in metrics), "lesions found"]
    rows = []
    for name, scores in report.summary.items():
        cells = [
            with_spread(scores[metric], min(METRICS[metric].decimals, 3)) for metric in metrics
        ]
        rows.append([printable(name), *cells, lesions_text(scores["lesions"])])
    return head, rows


def details(report: CaseReport, name: str) -> Table:
    """One class's table: n, mean, SD, median and interval of each metric."""
    rows = []
    for metric in METRICS:
        found, decimals = report.summary[name][metric], METRICS[metric].decimals
        values = [number(found[key], decimals) for key in ("mean", "std", "median")]
        interval = "-"
        if found["low"] is not None:
            interval = " to ".join(number(found[key], decimals) for key in ("low", "high"))
        rows.append([title_of(metric, report.cases.in_mm), str(found["n"]), *values, interval])
    return ["metric", *DETAILS], rows


def pooled_table(summary: Mapping[str, Any]) -> Table:
    """Table of Dice and IoU over all pixels of all slices, from a summary of `ClassCounts`."""
    rows = [
        [printable(name), number(dice), number(summary["iou"][name])]
        for name, dice in summary["dice"].items()
    ]
    rows.append([MEAN, number(summary["mean_dice"]), number(summary["mean_iou"])])
    return ["class", "Dice", "IoU"], rows


def case_table(report: CaseReport) -> Table:
    """The table of all cases and classes."""
    head = ["case", "class", *(title_of(metric, report.cases.in_mm) for metric in METRICS),
            "lesions found", ""]  # fmt: skip
    rows = []
    for case, name, row in case_rows(report):
        scores = [number(row[metric], METRICS[metric].decimals) for metric in METRICS]
        names = printable(case), printable(name)
        rows.append([*names, *scores, lesions_text(row), row["empty"]])
    return head, rows


def with_spread(scores: Mapping[str, Any], decimals: int) -> str:
    """Mean and standard deviation."""
    spread = "" if scores["std"] is None else f" ± {number(scores['std'], decimals)}"
    return number(scores["mean"], decimals) + spread


def lesions_text(lesions: Mapping[str, int]) -> str:
    """How many lesions were found, and how many false ones."""
    found, total, false = (lesions[key] for key in ("lesions_found", "lesions", "false_lesions"))
    return f"{found} of {total}, {false} false"
