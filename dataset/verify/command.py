"""Reads a whole data set and lists errors and warnings: python -m dataset.verify DIR.

Works on raw layouts and on prepared stores, changes nothing, and ends with 1 after an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dataset.parallel import default_workers, each_case
from dataset.prepare.sources import LAYOUTS, Source, find_source, guess_layout, with_series
from dataset.store.slices import SliceStore
from dataset.store.volumes import FORMAT, VolumeStore
from dataset.text import counted, printable
from dataset.verify.care import check_care
from dataset.verify.scans import Checked, Finding, ScanJob, check_scan, compare_cases, relative
from dataset.verify.stores import check_store

STORES = {"store": SliceStore, "volumes": VolumeStore}


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.verify",
        description="List errors and warnings of a raw data set or a prepared store."
        " Exit code 0: no error; 1: errors; 2: DIR cannot be checked.",
    )
    parser.add_argument("dir", type=Path, help="folder of a raw data set or of a store")
    parser.add_argument(
        "--source", choices=(*LAYOUTS, *STORES), help="layout of DIR; detected by default"
    )
    parser.add_argument(
        "--labels", type=Path, help="layout folder: the labels, where DIR holds the images"
    )
    parser.add_argument(
        "--channel", type=int, help="number of the channel to use in files with several, from 0"
    )
    parser.add_argument(
        "--series", type=int, help="which of several DICOM series in a case's folder, from 1"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="number of worker processes"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0 no error, 1 errors, 2 nothing to check."""
    args = build_parser().parse_args(arguments)
    try:
        layout, findings, files = verify(
            args.dir,
            layout=args.source,
            labels=args.labels,
            channel=args.channel,
            series=args.series,
            workers=args.workers,
        )
    except (ValueError, OSError) as error:
        print(f"verify: error: {error}", file=sys.stderr)
        return 2
    levels = {level: [f for f in findings if f.level == level] for level in ("error", "warning")}
    if args.json:
        print(json.dumps(_as_json(args.dir, layout, files, levels), indent=1))
    else:
        for finding in findings:
            print(printable(f"{finding.level:<8}{finding.file}: {finding.what}"))
        totals = " and ".join(counted(len(found), level) for level, found in levels.items())
        read = counted(files, "slice" if layout == "care" else "case")
        print(f"{layout}: {read} read, {totals}")
    return 1 if levels["error"] else 0


def _as_json(
    folder: Path, layout: str, files: int, levels: dict[str, list[Finding]]
) -> dict[str, Any]:
    listed = {
        f"{level}s": [{"file": finding.file, "what": finding.what} for finding in found]
        for level, found in levels.items()
    }
    return {"folder": str(folder), "layout": layout, "read": files, **listed}


def verify(
    folder: Path,
    *,
    layout: str | None = None,
    labels: Path | None = None,
    channel: int | None = None,
    series: int | None = None,
    workers: int = 1,
) -> tuple[str, list[Finding], int]:
    """(layout, findings sorted by file, cases or slices read) of a data set; reads all of it.

    Raises FileNotFoundError for a folder that is missing or follows no known layout, ValueError
    for a choice among files that a store or a CARE release does not have.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if layout is None:
        layout = stored_as(folder) or ("folder" if labels else guess_layout(folder))

    if layout in (*STORES, "care"):
        for name, value in (("labels", labels), ("channel", channel), ("series", series)):
            if value is not None:
                raise ValueError(f"{folder} is read as {layout}: leave out --{name}")

    def run(work: Callable[[Any], Checked], jobs: Sequence[Any]) -> Iterator[Checked]:
        results = each_case(work, jobs, workers=workers, title="verifying")
        order = {job: number for number, job in enumerate(jobs)}
        for job, result in sorted(results, key=lambda pair: order[pair[0]]):
            yield result if isinstance(result, Checked) else _unreadable(job, result)

    if layout in STORES:
        findings, files = check_store(STORES[layout], folder, run)
    elif layout == "care":
        findings, files = check_care(folder, run)
    else:
        findings, files = _check_scans(layout, folder, labels, channel, series, run)
    return layout, sorted(findings, key=lambda f: (f.level != "error", f.file, f.what)), files


def stored_as(folder: Path) -> str | None:
    """ "store" for prepared slices, "volumes" for prepared volumes, None for anything else."""
    path = folder / "index.json"
    if not path.exists():
        return None
    with path.open("rb") as file:  # the cases, which may be many, come first
        file.seek(max(path.stat().st_size - 2**16, 0))
        volumes = re.search(rb'"format": ?"%b"' % FORMAT.encode(), file.read())
        return "volumes" if volumes else "store"


def _unreadable(job: Any, error: Exception) -> Checked:
    checked = Checked(str(job), "", str(getattr(job, "path", job)))
    checked.error(error)
    return checked


def _check_scans(
    layout: str,
    folder: Path,
    labels: Path | None,
    channel: int | None,
    series: int | None,
    run: Callable[..., Iterator[Checked]],
) -> tuple[list[Finding], int]:
    """Findings about a WORD, nnU-Net or folder data set; of several channels, the first."""
    if layout == "nnunet" and channel is None:
        channel = 0
    try:
        source = with_series(find_source(layout, folder, labels=labels, channel=channel), series)
    except ValueError as error:
        text = str(error).removeprefix(f"{folder}/")
        return [Finding("error", text.partition(":")[0], text.partition(":")[2].strip())], 0
    num_classes = len(source.classes) if source.classes else None
    is_ct = source.window != "percentile"
    jobs = [ScanJob(case, source.root, num_classes, is_ct) for case in source.cases]
    cases = list(run(check_scan, jobs))
    findings = [finding for case in cases for finding in case.findings]
    findings += compare_cases(cases)
    findings += _unpaired(source)
    return findings, len(jobs)


def _unpaired(source: Source) -> Iterator[Finding]:
    for path in source.unmatched:
        yield Finding("error", relative(path, source.root), "label without an image of its name")
    for path in source.unlabelled:
        # Releases keep the labels of test scans back; elsewhere a label has been lost.
        level = "warning" if path.parent.name.endswith("Ts") else "error"
        yield Finding(level, relative(path, source.root), "image without a label of its name")
