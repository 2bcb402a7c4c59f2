"""Raw scans into a slice store: python -m dataset.prepare SOURCE --input DIR --output DIR.

Users run it once a data set; `--dataset store --data_root DIR` (or word) then trains from it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset import rectum, slices
from dataset.packing import Job, Options, pack_case
from dataset.parallel import default_workers, each_case
from dataset.scans import WINDOWS, Window, parse_window
from dataset.slices import SliceStore
from dataset.sources import LAYOUTS, Source, class_table, find_source
from dataset.splits import hold_out, split_table, write_json
from dataset.summary import summary_lines

EXAMPLES = """examples:
  python -m dataset.prepare word --input WORD-V0.1.0 --output data/WORD
  python -m dataset.prepare nnunet --input nnUNet_raw/Dataset004_Hippocampus --output data/H --window percentile
  python -m dataset.prepare folder --input scans --labels masks --output data/liver --classes liver tumour
"""  # noqa: E501
CARE_FLAGS = ("source", "input", "output", "folds", "seed", "workers")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.prepare",
        description="Turn raw scans into a slice store that trains by --dataset store.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", choices=LAYOUTS, help="layout of --input")
    parser.add_argument("--input", type=Path, required=True, help="folder of the release")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new store")
    parser.add_argument(
        "--window",
        nargs="+",
        metavar="W",
        help="LOW HIGH (HU), percentile (MR: 0.5 to 99.5 %% of each scan) or a preset:"
        f" {', '.join(WINDOWS)}; -160 240 unless dataset.json says it is not CT",
    )
    parser.add_argument("--spacing", type=_positive, help="in-plane mm a pixel; native if left out")
    parser.add_argument("--body_crop", action="store_true", help="cut slices to the patient")
    parser.add_argument("--clahe", action="store_true", help="training applies CLAHE (as for CARE)")
    parser.add_argument("--channel", type=int, help="which of several channels, from 0")
    parser.add_argument("--labels", type=Path, help="folder: the labels, --input being the images")
    parser.add_argument("--classes", nargs="+", help="folder: names of the labels 1, 2, ...")
    parser.add_argument("--folds", type=int, help="write cross-validation folds to splits.json")
    parser.add_argument(
        "--test_fraction",
        type=_fraction,
        default=0.0,
        help="share of the cases held out for testing where the source has no test split",
    )
    parser.add_argument("--seed", type=int, default=202307, help="of folds and held-out cases")
    parser.add_argument(
        "--ignore_label_affine", action="store_true", help="trust the order of a label's voxels"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.01 and 100 mm")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0, or 2 with one line a fault on stderr."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.source == "care":
        flags = [flag for flag in vars(args) if flag not in CARE_FLAGS]
        given = [flag for flag in flags if getattr(args, flag) != parser.get_default(flag)]
        if given:
            parser.error(f"care: the release is packed as it is; leave out --{given[0]}")
    elif args.source != "folder" and (args.labels or args.classes):
        parser.error("--labels and --classes belong to the source folder")
    try:
        if args.source == "care":
            index, left_out = prepare_care(args.input, args.output), []
            table = split_table(_places(index), folds=args.folds, seed=args.seed)
            write_json(args.output / "splits.json", table)
        else:
            index, left_out = _prepare_from_flags(args)
    except (ValueError, OSError) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: stopped; run it again to go on, finished cases are kept", file=sys.stderr)
        return 130
    print("\n".join(summary_lines(index, left_out)))
    return 0


def _prepare_from_flags(args: argparse.Namespace) -> tuple[slices.Entry, list[str]]:
    source = find_source(
        args.source, args.input, labels=args.labels, channel=args.channel, classes=args.classes
    )
    return prepare_scans(
        source,
        args.output,
        window=parse_window(args.window) if args.window else source.window,
        spacing=args.spacing,
        body_crop=args.body_crop,
        clahe=args.clahe,
        ignore_label_affine=args.ignore_label_affine,
        test_fraction=args.test_fraction,
        folds=args.folds,
        seed=args.seed,
        workers=args.workers,
    )


def prepare_care(release: Path, output: Path) -> slices.Entry:
    """Index of the store that `output` becomes from a CARE release; nothing is done twice."""
    splits = rectum.find_splits(release)
    digest = rectum.source_digest(release, splits)
    if not _holds(output, digest):
        _check_output(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        rectum.pack(splits, output, digest)
    return SliceStore(output).index


def prepare_scans(
    source: Source,
    output: Path,
    *,
    window: Window,
    spacing: float | None = None,
    body_crop: bool = False,
    clahe: bool = False,
    ignore_label_affine: bool = False,
    test_fraction: float = 0.0,
    folds: int | None = None,
    seed: int = 202307,
    workers: int = 1,
) -> tuple[slices.Entry, list[str]]:
    """(index, lines on what was left out) of the store made of a source's cases.

    Cases packed before from the same files with the same options are kept as they are. Raises
    ValueError, one line a fault, if a case cannot be packed; there is no index then.
    """
    source = _with_test_cases(source, test_fraction, seed)
    table = split_table([(case.id, case.split) for case in source.cases], folds=folds, seed=seed)
    _check_output(output)
    options = Options(
        window=window,
        spacing=spacing,
        body_crop=body_crop,
        num_classes=len(source.classes) if source.classes else 255,
        ignore_label_affine=ignore_label_affine,
    )
    jobs = [Job(case, output, options) for case in source.cases]
    _check_names(jobs)
    _sweep(output)
    entries = _packed(jobs, workers)
    index = {
        "dataset": source.name,
        "classes": source.classes or _classes_seen(entries),
        "window": list(window) if isinstance(window, tuple) else window,
        "orientation": "LPS",
        "spacing": spacing,
        "body_crop": body_crop,
        "clahe": clahe,
        "source": hashlib.sha256(
            "".join(entry["source"] for entry in entries).encode()
        ).hexdigest(),
        "cases": entries,
    }
    write_json(output / "splits.json", table)
    slices.write_index(output, index)
    return SliceStore(output).index, _left_out(source)


def _left_out(source: Source) -> list[str]:
    """Lines on the scans that could not be paired."""
    kinds = {
        "images without a label": source.unlabelled,
        "labels without an image": source.unmatched,
    }
    return [
        f"left out: {len(paths)} {kind}, first {paths[0].name}"
        for kind, paths in kinds.items()
        if paths
    ]


def _places(index: slices.Entry) -> list[tuple[str, str]]:
    return [(case["id"], case["split"]) for case in index["cases"]]


def _packed(jobs: list[Job], workers: int) -> list[slices.Entry]:
    """Entries of all cases in order of file name; every case is tried before any fault is told."""
    entries, faults = [], []
    for job, result in each_case(pack_case, jobs, workers=workers, title="preparing"):
        if isinstance(result, Exception):
            faults.append((job.file, str(result)))
        else:
            entries.append(result)
    if faults:
        lines = "\n".join(f"  {text}" for _, text in sorted(faults))
        raise ValueError(
            f"{len(faults)} of {len(jobs)} cases cannot be packed; mend or remove them and run"
            f" again, finished cases are kept:\n{lines}"
        )
    return sorted(entries, key=lambda entry: entry["file"])


def _with_test_cases(source: Source, fraction: float, seed: int) -> Source:
    if not fraction:
        return source
    if any(case.split == "test" for case in source.cases):
        raise ValueError(f"{source.name}: has test cases of its own; leave out --test_fraction")
    training = [case.id for case in source.cases if case.split == "train"]
    held_out = hold_out(training, fraction, seed)
    cases = [replace(case, split="test") if case.id in held_out else case for case in source.cases]
    return replace(source, cases=cases)


def _check_names(jobs: list[Job]) -> None:
    if not jobs:
        raise FileNotFoundError("no case has both an image and a label")
    for kind, names in (
        ("id", [job.case.id for job in jobs]),
        ("file", [job.file for job in jobs]),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            first = [job for job in jobs if twice[0] in (job.case.id, job.file)][:2]
            places = " and ".join(str(job.case.image) for job in first)
            raise ValueError(f"two cases of one {kind} {twice[0]!r}: {places}")


def _holds(output: Path, digest: str) -> bool:
    try:
        return SliceStore(output).index.get("source") == digest
    except (ValueError, OSError):
        return False


def _check_output(output: Path) -> None:
    """Raises ValueError for a folder that holds anything but a store, begun or finished."""
    ours = {"cases", "index.json", "splits.json"}
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is not a folder; choose another --output")
    others = [path.name for path in output.iterdir()] if output.is_dir() else []
    others = [name for name in others if name not in ours and not name.startswith(".")]
    if others:
        raise ValueError(f"{output}: holds other things ({others[0]}); choose another --output")


def _sweep(output: Path) -> None:
    """Takes away what a killed run left half written, and the index until the end."""
    (output / "cases").mkdir(parents=True, exist_ok=True)
    (output / "index.json").unlink(missing_ok=True)
    for folder in (output, output / "cases"):
        for path in folder.glob(".*"):
            if path.is_file() and path.name.rpartition(".")[2].isdigit():
                path.unlink()


def _classes_seen(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table for labels that nobody named: class 1 to the highest id found."""
    highest = max(len(row) for entry in entries for row in entry["pixels"]) - 1
    if highest < 1:
        raise ValueError("no label holds anything but background")
    return class_table([f"class {number}" for number in range(1, highest + 1)])


if __name__ == "__main__":
    sys.exit(main())
