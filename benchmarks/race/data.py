"""Patients in 60, 10 and 30 % for training, validation and testing, prepared once into a store."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.race.rows import ROOT
from dataset.scans.find import scan_stem
from dataset.store.slices import SliceStore

SHARES = {"Tr": 0.6, "Val": 0.1, "Ts": 0.3}
SPLIT_SEED = 19
LARGEST = 224  # side of the slices that a model sees, in pixels


def split_cases(cases: Sequence[str], seed: int = SPLIT_SEED) -> dict[str, list[str]]:
    """The cases of Tr, Val and Ts, sorted; the same for the same cases and seed.

    Testing and validation get their share, rounded, and at least one; training the rest.
    """
    ordered = sorted(set(cases))
    drawn = np.random.default_rng(seed).permutation(ordered).tolist()
    test, val = (max(1, round(len(drawn) * SHARES[end])) for end in ("Ts", "Val"))
    parts = {"Ts": drawn[:test], "Val": drawn[test : test + val], "Tr": drawn[test + val :]}
    if not parts["Tr"]:
        raise ValueError(f"{len(ordered)} cases are too few to split; the race wants 4 or more")
    return {end: sorted(parts[end]) for end in SHARES}


def paired_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Image and label by case, from imagesTr and labelsTr, or images and labels."""
    for end in ("Tr", ""):
        images, labels = folder / f"images{end}", folder / f"labels{end}"
        if images.is_dir() and labels.is_dir():
            break
    else:
        raise FileNotFoundError(f"{folder}: expected imagesTr and labelsTr, or images and labels")
    found = {scan_stem(path): path for path in images.iterdir()}
    pairs = {}
    for label in sorted(labels.iterdir()):
        case = scan_stem(label)
        image = found.get(case, found.get(f"{case}_0000"))
        if image is not None:
            pairs[case] = (image.resolve(), label.resolve())
    return pairs


def link_layout(pairs: dict[str, tuple[Path, Path]], layout: Path, classes: Sequence[str]) -> None:
    """The scans as links in nnU-Net's layout with a folder a split, for dataset.prepare."""
    for end, cases in split_cases(list(pairs)).items():
        for number, kind in enumerate(("images", "labels")):
            folder = layout / f"{kind}{end}"
            folder.mkdir(parents=True, exist_ok=True)
            for case in cases:
                link, target = folder / pairs[case][number].name, pairs[case][number]
                if not link.is_symlink():
                    link.symlink_to(target)
    labels = {name: number for number, name in enumerate(["background", *classes])}
    table = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz"}
    (layout / "dataset.json").write_text(json.dumps(table), encoding="utf-8")


def prepare(layout: Path, store: Path) -> SliceStore:
    """The store of a layout, made by the project's own command unless it is there."""
    if not (store / "index.json").is_file():
        words = ["nnunet", "--input", layout, "--output", store, "--window", "percentile"]
        command = [sys.executable, "-m", "dataset.prepare", *map(str, words), "--workers", "1"]
        print(" ".join(["python", *command[1:]]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
    return SliceStore(store)


def make_data(folder: Path, output: Path, classes: Sequence[str]) -> dict[str, Any]:
    """Folder of scans -> its store below `output`, with the store's digest and input size."""
    pairs = paired_files(folder)
    link_layout(pairs, output / "raw", classes)
    store = prepare(output / "raw", output / "store")
    return {"folder": output, "digest": store.digest, "img_size": input_size(store)}


def input_size(store: SliceStore) -> int:
    """The typical longer side of the stored slices, up to the next multiple of 16."""
    typical = statistics.median(max(case["shape"][1:]) for case in store.cases)
    return min(int(-(-typical // 16)) * 16, LARGEST)
