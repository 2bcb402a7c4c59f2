"""The table of the race as Markdown, from the results alone; rows that lose are in it as well."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.race.scores import (
    by_patient,
    interval,
    mean_known,
    paired_interval,
    pooled_dice,
)

Result = dict[str, Any]
Group = tuple[str, float, int, str, str]  # data, minutes, cores, split, store


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, in order of name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def tables(results: Iterable[Result]) -> str:
    """A table for each data set, time, number of cores and split."""
    groups: dict[Group, dict[str, list[Result]]] = {}
    for result in results:
        facts = result["settings"]
        group = tuple(facts[key] for key in ("data", "minutes", "cores", "split", "store"))
        groups.setdefault(group, {}).setdefault(facts["row"]["name"], []).append(result)
    return "\n".join(table(group, rows) for group, rows in sorted(groups.items()))


def best_peer(rows: Mapping[str, Sequence[Result]]) -> str | None:
    """The name of the peer with the highest mean Dice by case; None without peers."""
    peers = [name for name, runs in rows.items() if is_peer(runs)]
    return max(peers, key=lambda name: mean_dice(rows[name]), default=None)


def mean_dice(runs: Sequence[Result]) -> float:
    """Mean Dice by case over patients, classes and seeds."""
    return mean_known(list(by_patient(runs).values()))


def is_peer(runs: Sequence[Result]) -> bool:
    """Whether the runs of a row are another program's."""
    return runs[0]["settings"]["row"]["kind"] != "u-sam"


def table(group: Group, rows: Mapping[str, Sequence[Result]]) -> str:
    """The rows of one group, the best first; figures are means over seeds."""
    data, minutes, cores, split, _ = group
    peer = best_peer(rows)
    first = next(iter(rows.values()))[0]
    classes = first["classes"]
    where = "core" if cores == 1 else "cores"
    heads = ["", "seeds", "steps", "seconds", "pooled Dice", "Dice by case [95 %]", *classes,
             "HD95, pixels", "Dice less best peer's [95 %]"]  # fmt: skip
    lines = [
        f"### {data}: {minutes:g} minutes on {cores} {where}, {len(first['patients'])} {split} "
        "patients",
        "",
        "| " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * (len(heads) - 1),
    ]
    dice = {name: by_patient(runs) for name, runs in rows.items()}
    for name in sorted(rows, key=lambda name: -mean_dice(rows[name])):
        against = difference(dice[name], dice[peer]) if peer and name != peer else ""
        against = "best peer" if name == peer else against
        lines.append("| " + " | ".join([*cells(rows[name]), against]) + " |")
    found = [run for runs in rows.values() for run in runs]
    seeds = sorted({run["seed"] for run in found})
    dates = sorted({run["date"] for run in found})
    lines += ["", f"Seeds {', '.join(map(str, seeds))}; commit "
              f"{', '.join(sorted({run['commit'] for run in found}))}; "
              f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}.", ""]  # fmt: skip
    return "\n".join(lines)


def cells(runs: Sequence[Result]) -> list[str]:
    """A row's title and figures but for the comparison."""
    mean, low, high = interval(list(by_patient(runs).values()))
    pooled = [pooled_dice(run["patients"]) for run in runs]
    classes = [
        mean_known([p["dice"][number] for run in runs for p in run["patients"].values()])
        for number in range(len(runs[0]["classes"]))
    ]
    title = runs[0]["title"] + (" (stopped by the time)" if any(r.get("cut") for r in runs) else "")
    return [
        title,
        str(len(runs)),
        f"{statistics.mean(run['steps'] for run in runs):.0f}",
        f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        f"{mean_known([mean_known(one) for one in pooled]):.3f}",
        f"{mean:.3f} [{low:.3f}, {high:.3f}]" + seed_spread(runs),
        *(f"{value:.3f}" for value in classes),
        f"{mean_known(list(by_patient(runs, 'hd95').values())):.2f}",
    ]


def seed_spread(runs: Sequence[Result]) -> str:
    """The standard deviation of the mean Dice over seeds, where there are several."""
    means = [mean_dice([run]) for run in runs]
    return f", ± {statistics.stdev(means):.3f} over seeds" if len(means) > 1 else ""


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """The paired difference and whether it is more than its interval."""
    mean, low, high = paired_interval(ours, theirs)
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"
