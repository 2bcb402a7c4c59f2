"""The race on real patients: rows of equal wall time, each pinned to its core, and their table.

    python -m benchmarks.race --data acdc=FOLDER --classes acdc=RV,MYO,LV [--minutes 6] [--parallel 2]
    python -m benchmarks.race --table                       (from the results alone)
    python -m benchmarks.race --data ... --split val --extra "wide=--sam_model vit_tiny ..."

A FOLDER holds imagesTr and labelsTr, or images and labels. Patients are split 60/10/30 once. A row
whose result is there from the same settings and commit is not run again. Choices are made by
--split val; the test patients are for the table.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.race import table
from benchmarks.race.data import make_data
from benchmarks.race.rows import (
    NNUNET,
    ROOT,
    ROWS,
    USAM,
    Row,
    Run,
    commit,
    is_done,
    runs_of,
    usam_flags,
    usam_row,
)
from usam.cli.parser import parse_flags

OVERHEAD = 2400  # seconds that preparing, predicting and scoring may take beside the training


def main() -> None:
    options = parse()
    results = options.output / "results"
    if not options.table:
        names = dict(pair.split("=", 1) for pair in options.classes)
        data = {}
        for pair in options.data:
            name, folder = pair.split("=", 1)
            classes = names[name].split(",")
            data[name] = make_data(Path(folder), options.output / "data" / name, classes)
        results.mkdir(parents=True, exist_ok=True)
        run_all(options, data, results)
    print(table.tables(table.read_results(results)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME=CLASS,CLASS,...")
    parser.add_argument("--output", type=Path, default=Path("race"), help="for data and results")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training a row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--extra", nargs="+", default=[], metavar="NAME=FLAGS",
                        help="more rows of u-sam.py")  # fmt: skip
    parser.add_argument("--split", choices=("test", "val"), default="test", help="that scores")
    parser.add_argument("--parallel", type=int, default=1, help="rows at a time")
    parser.add_argument("--cores", type=int, default=1, help="cores a row")
    parser.add_argument("--nnunet", type=Path, help="folder with nnUNetv2_train, as VENV/bin")
    parser.add_argument("--any_commit", action="store_true", help="keep results of other commits")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    known, cpus = {row.name for row in ROWS}, len(os.sched_getaffinity(0))
    if unknown := set(options.rows or ()) - known:
        parser.error(f"--rows: no row {min(unknown)}; there are {', '.join(sorted(known))}")
    if options.parallel * options.cores > cpus:
        parser.error(f"--parallel {options.parallel} --cores {options.cores}: {cpus} cores here")
    named = {pair.partition("=")[0] for pair in options.classes}
    if missing := {pair.partition("=")[0] for pair in options.data} - named:
        parser.error(f"--classes: name those of {min(missing)}, as {min(missing)}=liver,spleen")
    if not options.table and not options.data:
        parser.error("--data NAME=FOLDER is needed, or --table")
    return options


def wanted_rows(options: argparse.Namespace) -> list[Row]:
    """The rows to run: --rows or all, and --extra; --rows none of them with --extra alone."""
    extra = [usam_row(*pair.split("=", 1)) for pair in options.extra]
    if options.rows is None and extra:
        return extra
    return [row for row in ROWS if options.rows is None or row.name in options.rows] + extra


def reason_to_leave_out(row: Row, run: Run, options: argparse.Namespace) -> str:
    """Why a row cannot be run here; empty if it can."""
    if row.kind == NNUNET and not options.nnunet:
        return "no --nnunet"
    said = io.StringIO()
    if row.kind == USAM:
        try:
            with contextlib.redirect_stderr(said):
                parse_flags(usam_flags(run, Path("store"), Path("folder")))
        except SystemExit:
            return said.getvalue().strip().splitlines()[-1]
    return ""


def run_all(options: argparse.Namespace, data: dict[str, Any], results: Path) -> None:
    """Run what is not done, `parallel` at a time on cores of their own."""
    common = {"minutes": options.minutes, "split": options.split, "cores": options.cores}
    runs = runs_of(wanted_rows(options), data, options.seeds, **common)
    why = {run.row.name: reason_to_leave_out(run.row, run, options) for run in runs}
    for name, reason in why.items():
        if reason:
            print(f"{name}: left out, {reason}", flush=True)
    code, free = commit(), queue.Queue()
    cpus = sorted(os.sched_getaffinity(0))
    for number in range(options.parallel):
        free.put(cpus[number * options.cores : (number + 1) * options.cores])
    with ThreadPoolExecutor(options.parallel) as pool:
        for run in runs:
            path = results / f"{run.name}.json"
            if why[run.row.name]:
                continue
            if is_done(path, run, None if options.any_commit else code):
                print(f"{run.name}: done before", flush=True)
                continue
            pool.submit(run_one, run, data[run.data]["folder"], path, options, code, free)


def run_one(
    run: Run, data: Path, path: Path, options: argparse.Namespace, code: str, free: queue.Queue
) -> None:
    """Run one row in its process and print its Dice, or where its error is."""
    folder = options.output / "runs" / run.name
    for old in (folder, path):
        set_aside(old)
    folder.mkdir(parents=True)
    cores = free.get()
    task = {
        "run": run.settings() | {"row": vars(run.row)}, "cores": cores, "commit": code,
        "data": str(data.resolve()), "folder": str(folder.resolve()),
        "result": str(path.resolve()), "nnunet": str(options.nnunet and options.nnunet.resolve()),
    }  # fmt: skip
    file, log = folder / "task.json", folder / "row.txt"
    file.write_text(json.dumps(task), encoding="utf-8")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(len(cores)))
    command = [sys.executable, "-m", "benchmarks.race.row", str(file.resolve())]
    try:
        with log.open("w", encoding="utf-8") as text:
            done = subprocess.run(
                command, stdout=text, stderr=text, cwd=ROOT, env=os.environ | threads,
                timeout=run.minutes * 60 + OVERHEAD,
            )  # fmt: skip
        failed = done.returncode
    except subprocess.TimeoutExpired:
        failed = "no end in time"
    finally:
        free.put(cores)
    if failed:
        print(f"{run.name}: failed ({failed}), see {log}", flush=True)
    else:
        result = json.loads(path.read_text(encoding="utf-8"))
        print(
            f"{run.name}: Dice by case {table.mean_dice([result]):.3f}, {result['steps']} steps, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )


def set_aside(path: Path) -> None:
    """Rename what was made by other settings or another commit."""
    if path.exists():
        other = next(o for n in count(1) if not (o := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(other)


if __name__ == "__main__":
    main()
