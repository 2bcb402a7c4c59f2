"""The evidence table: 2D and 2.5D by the published and the strong recipe, on two stand-ins.

    python -m benchmarks.evidence --labels WORD-V0.1.0/labelsTs [--output evidence] [--parallel 2]
    python -m benchmarks.evidence --table          (from the runs that are there, without training)

Runs are u-sam.py's own; one that was done by the same commands is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- table: written by benchmarks/evidence.py -->", "<!-- end of table -->"
COMMANDS = "commands.json"
STAND_INS = ("phantom", "anatomy")
INPUTS, RECIPES, SEEDS = ("2d", "2.5d"), ("published", "strong"), (11, 12, 13)
TEST_FRACTION = "0.28"  # of the anatomy's cases: 5 of 18
# Small enough for a CPU; the same for all.
COMMON = (
    "--sam_model", "vit_tiny", "--sam_weight", "none", "--img_size", "64", "--epochs", "2",
    "--batch_size", "4", "--lr", "2e-3", "--lr_vit", "2e-4", "--lr_backbone", "5e-4",
    "--val_fraction", "0.2", "--num_workers", "0", "--augment", "published",
)  # fmt: skip


class Setting(NamedTuple):
    """One run of the table."""

    stand_in: str
    input: str
    recipe: str
    seed: int

    def folder(self, output: Path) -> Path:
        """Where the run's files go."""
        return output / f"{self.stand_in}-{self.input}-{self.recipe}-{self.seed}"


class Scores(NamedTuple):
    """Test Dice of one setting's seeds: of each class and the mean of all, a value a seed."""

    by_class: dict[str, list[float]]
    mean: list[float]


def data_flags(stand_in: str, output: Path) -> list[str]:
    """What names a stand-in's data to u-sam.py."""
    dataset = "phantom" if stand_in == "phantom" else "store"
    return ["--dataset", dataset, "--data_root", str(output / "data" / stand_in)]


def commands(setting: Setting, output: Path) -> list[list[str]]:
    """The training and the evaluation of a setting, as arguments of u-sam.py."""
    folder = setting.folder(output)
    data = [*data_flags(setting.stand_in, output), "--output_dir", str(folder)]
    how = ["--input", setting.input, "--recipe", setting.recipe, "--seed", str(setting.seed)]
    return [
        [*COMMON, *data, *how],
        ["--eval", "--resume", str(folder / "best.pth"), "--num_workers", "0", *data],
    ]


def told(setting: Setting) -> str:
    """What a setting's folder keeps of its commands, wherever the folder is."""
    return json.dumps(commands(setting, Path()))


def by_these_commands(setting: Setting, output: Path) -> bool:
    """Whether a setting's folder was made by the commands of today."""
    kept = setting.folder(output) / COMMANDS
    return kept.is_file() and kept.read_text(encoding="utf-8") == told(setting)


def is_done(setting: Setting, output: Path) -> bool:
    """Whether a setting was trained and evaluated by the commands of today."""
    metrics = setting.folder(output) / "metrics.json"
    return metrics.is_file() and by_these_commands(setting, output)


def run(setting: Setting, output: Path, device: str, threads: int) -> None:
    """Train and evaluate a setting unless it is done; raises RuntimeError if one of them fails."""
    folder = setting.folder(output)
    if is_done(setting, output):
        return
    if folder.exists() and not by_these_commands(setting, output):
        others = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
        aside = next(other for other in others if not other.exists())
        folder.rename(aside)
        print(f"{folder.name}: was made by other commands, now {aside.name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMANDS).write_text(told(setting), encoding="utf-8")
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for words in commands(setting, output):
        with (folder / "output.txt").open("a", encoding="utf-8") as log:
            done = subprocess.run(
                [sys.executable, str(ROOT / "u-sam.py"), *words, "--device", device],
                stdout=log, stderr=log, env=variables,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{folder.name} failed, see {folder / 'output.txt'}")
    print(f"{folder.name}: mean test Dice {read_scores(folder)['mean_dice']:.4f}", flush=True)


def make_data(output: Path, labels: Path | None, wanted: Sequence[str] = STAND_INS) -> list[str]:
    """Those `wanted` there is data for; the anatomy is made from `labels` where it is missing."""
    store = output / "data" / "anatomy"
    if "anatomy" not in wanted or (store / "index.json").is_file():
        return list(wanted)
    if labels is None or not labels.is_dir():
        where = f"no folder {labels}" if labels else "no --labels"
        print(f"anatomy: {where}; left out. --labels wants a folder of label maps", flush=True)
        return [name for name in wanted if name != "anatomy"]
    command = ["anatomy", "--input", labels, "--output", store, "--test_fraction", TEST_FRACTION]
    subprocess.run(
        [sys.executable, "-m", "dataset.prepare", *map(str, command)], cwd=ROOT, check=True
    )
    return list(wanted)


# ------------------------------------------------------------------------------- the table


def read_scores(folder: Path) -> dict:
    """The metrics.json of a run."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def scores_of(output: Path, stand_in: str, input_mode: str, recipe: str) -> Scores | None:
    """The scores of a setting; None unless all its seeds are there."""
    runs = [Setting(stand_in, input_mode, recipe, seed) for seed in SEEDS]
    if not all(is_done(setting, output) for setting in runs):
        return None
    found = [read_scores(setting.folder(output)) for setting in runs]
    by_class = {name: [run["dice"][name] for run in found] for name in list(found[0]["dice"])[1:]}
    return Scores(by_class, [run["mean_dice"] for run in found])


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def comparison(title: str, better: Sequence[float], worse: Sequence[float]) -> str:
    """By how much one setting beats another, and whether by more than the spread over seeds."""
    gain = statistics.mean(better) - statistics.mean(worse)
    noise = max(statistics.stdev(better), statistics.stdev(worse))
    verdict = "more than" if gain > noise else "not more than"
    return f"- {title}: {gain:+.3f}, {verdict} the spread over seeds ({noise:.3f})"


def table(output: Path, stand_in: str) -> list[str]:
    """Lines of Markdown: test Dice by class and setting, then the comparisons."""
    columns = list(product(INPUTS, RECIPES))
    found = {column: scores_of(output, stand_in, *column) for column in columns}
    if None in found.values():
        return [f"### {stand_in}", "", "not run", ""]
    lines = [
        f"### {stand_in}",
        "",
        "| test Dice | " + " | ".join(f"{mode}, {recipe}" for mode, recipe in columns) + " |",
        "| --- |" + " --- |" * len(columns),
        "| **mean of classes** | " + " | ".join(spread(found[c].mean) for c in columns) + " |",
    ]
    for name in found[columns[0]].by_class:
        lines.append(
            f"| {name} | " + " | ".join(spread(found[c].by_class[name]) for c in columns) + " |"
        )
    strong = [
        comparison(f"strong over published, {mode}", found[mode, "strong"].mean,
                   found[mode, "published"].mean) for mode in INPUTS
    ]  # fmt: skip
    deep = [
        comparison(f"2.5d over 2d, {recipe}", found["2.5d", recipe].mean, found["2d", recipe].mean)
        for recipe in RECIPES
    ]
    return [*lines, "", *strong, *deep, ""]


def write_page(output: Path, page: Path = PAGE) -> None:
    """Replace the part of the page between its marks by the table of the runs in `output`."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [line for stand_in in STAND_INS for line in table(output, stand_in)]
    page.write_text("\n".join([before + BEGIN, "", *lines, END + after]), encoding="utf-8")
    print(f"written: {page}")


def settings(stand_ins: Sequence[str]) -> Iterator[Setting]:
    """All runs, seed by seed, so that an early look compares all settings."""
    for seed, stand_in, mode, recipe in product(SEEDS, stand_ins, INPUTS, RECIPES):
        yield Setting(stand_in, mode, recipe, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, help="folder of label maps for the anatomy")
    parser.add_argument("--output", type=Path, default=Path("evidence"), help="for data and runs")
    parser.add_argument("--only", nargs="+", choices=STAND_INS, default=list(STAND_INS))
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="auto", help="as of u-sam.py")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.table:
        stand_ins = make_data(options.output, options.labels, options.only)
        threads = max(1, (os.cpu_count() or 1) // options.parallel)
        with ThreadPoolExecutor(options.parallel) as pool:
            jobs = [
                pool.submit(run, setting, options.output, options.device, threads)
                for setting in settings(stand_ins)
            ]
            for job in jobs:
                job.result()
    write_page(options.output)


if __name__ == "__main__":
    main()
