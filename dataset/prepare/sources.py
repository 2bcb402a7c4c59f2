"""Finds scans and labels in raw data: WORD, nnU-Net, or two folders paired by name.

`prepare` packs the cases listed here and `verify` checks them; nothing is read but names and
dataset.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataset import care as rectum
from dataset import word
from dataset.labels import MAX_LABEL
from dataset.palette import class_colors
from dataset.scans.find import is_scan_name, scan_stem
from dataset.scans.window import Window

LAYOUTS = ("word", "care", "nnunet", "folder")
SPLIT_FOLDERS = {"Tr": "train", "Val": "val", "Va": "val", "Ts": "test"}
MAX_JSON_BYTES = 64 << 20
ABDOMEN = (-160.0, 240.0)


@dataclass(frozen=True)
class CaseFiles:
    """One labelled scan: id, split (train, val, test), its image and its label."""

    id: str
    split: str
    image: Path
    label: Path
    channel: int | None = None  # of a file with several
    series: int | None = None  # of a folder with several DICOM series


@dataclass(frozen=True)
class Source:
    """A raw data set as found on disk.

    classes: (id, name, colour) rows from 0, or None where only the labels tell. unlabelled and
    unmatched: images without a label and labels without an image, which cannot be packed.
    """

    name: str
    root: Path
    classes: list[dict[str, Any]] | None
    cases: list[CaseFiles]
    window: Window = ABDOMEN  # unless the user says otherwise
    unlabelled: list[Path] = field(default_factory=list)
    unmatched: list[Path] = field(default_factory=list)


def class_table(names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows {id, name, color} for the classes 1, 2, ..., the background before them.

    Raises ValueError for more than MAX_LABEL names.
    """
    if len(names) > MAX_LABEL:
        raise ValueError(f"{len(names)} classes; at most {MAX_LABEL} are supported")
    colors = class_colors(None, len(names) + 1)
    return [
        {"id": number, "name": name, "color": color}
        for number, (name, color) in enumerate(zip(["background", *names], colors, strict=True))
    ]


def guess_layout(root: Path) -> str:
    """Which of LAYOUTS a folder follows; raises FileNotFoundError if it is none of them."""
    if any((root / split / f"{split}_npz").is_dir() for split in ("train", "test")):
        return "care"
    if (root / "dataset.json").is_file():
        return "nnunet"
    if with_splits(root) is not None:
        return "word"
    if (root / "images").is_dir() and (root / "labels").is_dir():
        return "folder"
    raise FileNotFoundError(
        f"{root}: no prepared store, WORD or nnU-Net folders (imagesTr, labelsTr), CARE release"
        f" ({rectum.LAYOUT}) or images and labels folders"
    )


def find_source(
    name: str,
    root: Path,
    *,
    labels: Path | None = None,
    channel: int | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """The cases of a WORD, nnU-Net or folder data set, sorted by split and id.

    labels, for `folder`: the labels' folder, root then being the images'; channel as given by the
    user; classes names the labels 1, 2, ... of a `folder`. Raises FileNotFoundError for another
    layout and ValueError for a dataset.json that cannot be used.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: no folder {root}; pass --input")
    if name == "word":
        source = find_word(root, channel)
    elif name == "nnunet":
        source = find_nnunet(root, channel)
    else:
        source = find_folder(root, labels, channel, classes)
    order = {"train": 0, "val": 1, "test": 2}
    cases = sorted(source.cases, key=lambda case: (order[case.split], case.id))
    return replace(source, cases=cases)


def find_word(root: Path, channel: int | None = None) -> Source:
    """WORD as released, or a copy with nnU-Net names; root may be the folder above it."""
    found = with_splits(root)
    if found is None:
        raise FileNotFoundError(
            f"word: no scans under {root}; expected imagesTr/word_0002.nii.gz, labelsTr/..., and"
            " the same for Val and Ts"
        )
    return paired_splits(Source("word", found, class_table(word.ORGANS), []), channel)


def find_nnunet(root: Path, channel: int | None = None) -> Source:
    """An nnU-Net raw data set (dataset.json of version 1 or 2), or one of the Decathlon."""
    path = root / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"nnunet: no dataset.json in {root}; pass --input DATASET_FOLDER")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        table = json.loads(path.read_bytes())
        names = table.get("channel_names", table.get("modality", {"0": "CT"}))
        channels = [str(names[str(number)]) for number in range(len(names))]
        labels = dict(table["labels"])
        if not channels:
            raise ValueError("it names no channel")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not an nnU-Net dataset.json ({error!r:.80})") from None
    if len(channels) > 1 and channel is None:
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(channels))
        raise ValueError(f"{path}: several channels ({listed}); choose one with --channel")
    if channel is not None and not 0 <= channel < len(channels):
        raise ValueError(f"{path}: no channel {channel}; channels are 0 to {len(channels) - 1}")
    window = ABDOMEN if channels[channel or 0].upper() == "CT" else "percentile"
    classes = class_table(_nnunet_names(path, labels))
    source = paired_splits(Source("nnunet", root, classes, [], window), channel)
    if not source.cases:
        raise FileNotFoundError(f"nnunet: no labelled scans in {root}; expected imagesTr, labelsTr")
    return source


def _nnunet_names(path: Path, labels: dict[str, Any]) -> list[str]:
    """Names of the labels 1, 2, ...; version 1 maps ids to names, version 2 names to ids."""
    regions = [name for name, value in labels.items() if isinstance(value, (list, tuple))]
    if regions:
        raise ValueError(
            f"{path}: region labels are not supported ({', '.join(regions)}); give every class one"
            " id of its own"
        )
    if "ignore" in labels or "ignore" in labels.values():
        raise ValueError(f"{path}: an ignore label is not supported; relabel it or leave it out")
    if all(re.fullmatch(r"\d+", key) for key in labels):
        names = {int(key): str(value) for key, value in labels.items()}
    else:
        try:
            names = {int(value): key for key, value in labels.items()}
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}: labels must be ids: {labels!r:.120}") from None
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise ValueError(f"{path}: label ids must be 0, 1, 2, ..., found {sorted(names)!r:.80}")
    return [names[number] for number in range(1, len(names))]


def find_folder(
    root: Path, labels: Path | None, channel: int | None, classes: Sequence[str] | None
) -> Source:
    """Two folders paired by name: root and labels, or root/images and root/labels."""
    images = root
    if labels is None:
        images, labels = root / "images", root / "labels"
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"folder: no folder {folder}; expected images and labels below --input, or --labels"
            )
    table = class_table(classes) if classes else None
    if images.resolve() == labels.resolve():
        raise ValueError(f"folder: images and labels are the same folder, {images}; name two")
    source = _paired(Source("folder", root, table, []), images, labels, "train", channel)
    if not source.cases:
        raise FileNotFoundError(
            f"folder: no scan in {images} has a label of its name in {labels}{_other_files(labels)}"
        )
    return source


def _other_files(labels: Path) -> str:
    """A remark on label files that cannot be read, such as PNG; empty if there are none."""
    files = [path for path in labels.iterdir() if path.is_file() and not path.name.startswith(".")]
    ends = sorted({path.suffix for path in files if not is_scan_name(path.name)} - {""})
    if not ends:
        return ""
    return f", whose {', '.join(ends[:3])} files are not label maps; convert them to NIfTI"


def with_series(source: Source, number: int | None) -> Source:
    """The source with the number of the DICOM series to take from every case's folder."""
    if number is None:
        return source
    return replace(source, cases=[replace(case, series=number) for case in source.cases])


def with_splits(root: Path) -> Path | None:
    """The folder itself or its only child that holds imagesTr (or imagesTs)."""
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        if any((folder / f"images{end}").is_dir() for end in SPLIT_FOLDERS):
            return folder
    return None


def paired_splits(source: Source, channel: int | None) -> Source:
    """The source with all cases of its imagesTr, labelsTr and the like for Val, Va and Ts."""
    for end, split in SPLIT_FOLDERS.items():
        images, labels = source.root / f"images{end}", source.root / f"labels{end}"
        if images.is_dir() or labels.is_dir():
            source = _paired(source, images, labels, split, channel)
    return source


def _paired(source: Source, images: Path, labels: Path, split: str, channel: int | None) -> Source:
    """The source with one more pair of folders.

    A label CASE belongs to the image CASE, or CASE_000k of nnU-Net's channel k; WORD's own names
    end in four digits, so the exact name goes first.
    """
    found, wanted = _scans(images), _scans(labels)
    cases, unmatched, used = [], [], set()
    for stem, label in wanted.items():
        suffixed = f"{stem}_{channel or 0:04d}"
        if stem in found:
            cases.append(CaseFiles(stem, split, found[stem], label, channel))
        elif suffixed in found:
            cases.append(CaseFiles(stem, split, found[suffixed], label))
        else:
            unmatched.append(label)
        used.add(stem)
    unlabelled = [
        path
        for stem, path in found.items()
        if stem not in used and re.sub(r"_\d{4}$", "", stem) not in used
    ]
    return replace(
        source,
        cases=source.cases + cases,
        unlabelled=source.unlabelled + unlabelled,
        unmatched=source.unmatched + unmatched,
    )


def _scans(folder: Path) -> dict[str, Path]:
    """Scans of a folder by stem, sorted; hidden files (AppleDouble copies) do not count."""
    found: dict[str, Path] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        is_scan = path.is_dir() or is_scan_name(path.name)
        if path.name.startswith(".") or not is_scan:
            continue
        stem = scan_stem(path)
        if stem in found:
            raise ValueError(f"{folder}: two scans named {stem} ({found[stem].name}, {path.name})")
        found[stem] = path
    return found
