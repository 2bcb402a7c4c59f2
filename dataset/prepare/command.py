"""Raw scans into a slice store: python -m dataset.prepare SOURCE --input DIR --output DIR.

Users run it once a data set; `--dataset store --data_root DIR` (or word) then trains from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset import care as rectum
from dataset.parallel import default_workers
from dataset.phantom import anatomy
from dataset.prepare.slices import SliceOptions, prepare_scans, write_splits
from dataset.prepare.sources import LAYOUTS, find_source, with_series
from dataset.prepare.summary import left_out_lines, summary_lines, volume_summary_lines
from dataset.prepare.volume_sources import find_volumes
from dataset.prepare.volumes import VolumeOptions, prepare_volumes
from dataset.scans.window import WINDOWS, parse_window
from dataset.store.folder import Entry, new_store
from dataset.store.slices import SliceStore

EXAMPLES = """examples:
  python -m dataset.prepare word --input WORD-V0.1.0 --output data/WORD
  python -m dataset.prepare nnunet --input nnUNet_raw/Dataset004_Hippocampus --output data/H --window percentile
  python -m dataset.prepare folder --input scans --labels masks --output data/liver --classes liver tumour
  python -m dataset.prepare volumes --input nnUNet_raw/Dataset017_BTCV --output data/BTCV
  python -m dataset.prepare anatomy --input WORD-V0.1.0/labelsTs --output data/anatomy
"""  # noqa: E501
COMMON_FLAGS = {"source", "input", "output", "seed", "workers", "overwrite"}
FLAGS_OF = {  # of a source, besides; folder has all but --min_volume
    "care": {"folds"},
    "anatomy": {"classes", "test_fraction"},
    "volumes": {
        *(
            "channel",
            "series",
            "labels",
            "classes",
            "test_fraction",
            "ignore_label_affine",
            "min_volume",
        ),
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.prepare",
        description="Turn raw scans into a store for training with --dataset store or volumes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        choices=(*LAYOUTS, "volumes", "anatomy"),
        help="layout of --input; volumes (for --model sam-med3d): detected; anatomy: label maps,"
        " to which CT scans are drawn",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        nargs="+",
        help="folder of the raw data; volumes: also several roots with CLASS/MODALITY_DATASET",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the new store")
    parser.add_argument(
        "--window",
        nargs="+",
        metavar="W",
        help="LOW HIGH (HU), percentile (MR: 0.5 to 99.5 %% of each scan) or a preset:"
        f" {', '.join(WINDOWS)}; -160 240 unless dataset.json says it is not CT",
    )
    parser.add_argument(
        "--spacing",
        type=_positive,
        help="in-plane pixel size in mm to resample to (default: the scan's own)",
    )
    parser.add_argument("--body_crop", action="store_true", help="crop slices to the patient")
    parser.add_argument(
        "--clahe", action="store_true", help="apply CLAHE when slices are read, as for CARE"
    )
    _add_case_flags(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files in --output that this program did not write",
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="number of worker processes"
    )
    return parser


def _add_case_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for choosing cases, naming labels and splitting."""
    parser.add_argument(
        "--channel", type=int, help="number of the channel to use in files with several, from 0"
    )
    parser.add_argument(
        "--series",
        type=int,
        help="number of the DICOM series to use in folders with several, from 1",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="folder and volumes: the labels, where --input holds the images",
    )
    parser.add_argument(
        "--classes", nargs="+", help="folder, volumes and anatomy: names of the labels 1, 2, ..."
    )
    parser.add_argument("--folds", type=int, help="write cross-validation folds to splits.json")
    parser.add_argument(
        "--test_fraction",
        type=_fraction,
        default=0.0,
        help="share of the cases held out for testing where the source has no test split",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=202307,
        help="random seed of the folds and of the held-out cases",
    )
    parser.add_argument(
        "--ignore_label_affine",
        action="store_true",
        help="accept labels whose affine differs from the image's, trusting the voxel order",
    )
    parser.add_argument(
        "--min_volume",
        type=_volume,
        default=1.0,
        help="volumes: smallest structure to use as an object, in cm3 (default: 1)",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.01 and 100 mm")
    return value


def _volume(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and a million cm3")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0, or 2 with one line per error on stderr."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    _check_flags(parser, args)
    try:
        lines = _summary_from_flags(args)
    except (ValueError, OSError) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: stopped; finished cases are kept for the next run", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with an error if a flag has no effect for the source."""
    given = [flag for flag in vars(args) if getattr(args, flag) != parser.get_default(flag)]
    if args.source in FLAGS_OF:
        useless = [f for f in given if f not in COMMON_FLAGS | FLAGS_OF[args.source]]
        if useless:
            as_it_is = "the release is packed as it is; " if args.source == "care" else ""
            parser.error(f"{args.source}: {as_it_is}leave out --{useless[0]}")
        return
    if args.source != "folder" and (args.labels or args.classes):
        parser.error("--labels and --classes are for the sources folder and volumes")
    if "min_volume" in given:
        parser.error("--min_volume is for the source volumes")


def _summary_from_flags(args: argparse.Namespace) -> list[str]:
    """Prepares the data as the flags say; returns a summary in lines."""
    common = {
        name: getattr(args, name) for name in ("test_fraction", "seed", "workers", "overwrite")
    }
    found = {"labels": args.labels, "channel": args.channel, "classes": args.classes}
    if args.source == "volumes":
        options = VolumeOptions(
            min_volume=args.min_volume, ignore_label_affine=args.ignore_label_affine
        )
        source = with_series(find_volumes(args.input, **found), args.series)
        index = prepare_volumes(source, args.output, options, **common)
        return volume_summary_lines(index, left_out_lines(source))
    if len(args.input) > 1:
        raise ValueError(f"{args.source}: expected one folder in --input, found {len(args.input)}")
    if args.source == "anatomy":
        index = anatomy.build(args.input[0], args.output, names=args.classes, **common)
        return summary_lines(index)
    if args.source == "care":
        index = prepare_care(
            args.input[0], args.output, args.folds, seed=args.seed, overwrite=args.overwrite
        )
        return summary_lines(index)
    source = with_series(find_source(args.source, args.input[0], **found), args.series)
    options = SliceOptions(
        window=parse_window(args.window) if args.window else source.window,
        spacing=args.spacing,
        body_crop=args.body_crop,
        ignore_label_affine=args.ignore_label_affine,
    )
    index, lines = prepare_scans(
        source, args.output, options, clahe=args.clahe, folds=args.folds, **common
    )
    return summary_lines(index, lines)


def prepare_care(
    release: Path, output: Path, folds: int | None, *, seed: int, overwrite: bool
) -> Entry:
    """Packs a CARE release into a store in `output`, unless it is there; returns its index."""
    splits = rectum.find_splits(release)
    digest = rectum.source_digest(release, splits)
    if not rectum.holds(output, digest):
        with new_store(output, "preparing", overwrite=overwrite) as new:
            rectum.pack(splits, new, digest)
            write_splits(new, SliceStore(new).cases, folds=folds, seed=seed)
    else:
        write_splits(output, SliceStore(output).cases, folds=folds, seed=seed)
    return SliceStore(output).index
