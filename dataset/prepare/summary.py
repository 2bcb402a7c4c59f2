"""The table at the end of `prepare`: the content of a store, in lines of text.

Everything is counted from the index; no array is opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dataset.prepare.sources import Source
from dataset.text import counted

NO_AIR = -300  # HU; scans without lower values are probably not CT


def summary_lines(index: dict[str, Any], left_out: Iterable[str] = ()) -> list[str]:
    """Lines: cases and slices per split, voxels and slices per class, spacings, HU range."""
    lines = [f"{'split':<8}{'cases':>8}{'slices':>10}{'with foreground':>18}"]
    for split in ("train", "val", "test"):
        cases = [case for case in index["cases"] if case["split"] == split]
        if not cases:
            continue
        pixels = np.concatenate([np.array(case["pixels"]) for case in cases])
        with_foreground = int((pixels[:, 1:].sum(axis=1) > 0).sum())
        ids = {case["id"] for case in cases}
        lines.append(f"{split:<8}{len(ids):>8}{len(pixels):>10}{with_foreground:>18}")
    lines += ["", *_class_lines(index), "", *_geometry_lines(index["cases"])]
    return [*lines, *_missing_lines(index), *remark_lines(index), *left_out]


def remark_lines(index: dict[str, Any]) -> list[str]:
    """A warning for every remark on a scan's header."""
    return [
        f"warning: {case['id']}: {remark}"
        for case in index["cases"]
        for remark in case.get("remarks", ())
    ]


def volume_summary_lines(index: dict[str, Any], left_out: Iterable[str] = ()) -> list[str]:
    """Lines: patients and objects per split, objects and voxels per class, excluded structures."""
    lines = [f"{'split':<8}{'patients':>10}{'cases':>8}{'objects':>10}"]
    for split in ("train", "val", "test"):
        cases = [case for case in index["cases"] if case["split"] == split]
        if cases:
            patients = len({case["patient"] for case in cases})
            objects = sum(len(case["objects"]) for case in cases)
            lines.append(f"{split:<8}{patients:>10}{len(cases):>8}{objects:>10}")
    lines += ["", f"{'id':>3} {'class':<22}{'objects':>9}{'voxels':>14}"]
    for row in index["classes"][1:]:
        holders = [case for case in index["cases"] if row["id"] in case["objects"]]
        voxels = sum(sum(case["pixels"][str(row["id"])]) for case in holders)
        lines.append(f"{row['id']:>3} {row['name']:<22.22}{len(holders):>9}{voxels:>14}")
    dropped = [line for case in index["cases"] for line in case["dropped"]]
    if dropped:
        lines += ["", f"no objects, {len(dropped)}:", *(f"  {line}" for line in dropped)]
    return [*lines, *remark_lines(index), *left_out]


def left_out_lines(source: Source) -> list[str]:
    """Lines on the scans that could not be paired."""
    kinds = (
        ("image", "without a label", source.unlabelled),
        ("label", "without an image", source.unmatched),
    )
    return [
        f"left out: {counted(len(paths), noun)} {lacking}, first {paths[0].name}"
        for noun, lacking, paths in kinds
        if paths
    ]


def _class_lines(index: dict[str, Any]) -> list[str]:
    lines = [f"{'id':>3} {'class':<22}{'voxels':>14}{'slices':>9}{'cases':>8}"]
    per_case = [np.array(case["pixels"]) for case in index["cases"]]
    for row in index["classes"]:
        columns = [pixels[:, row["id"]] for pixels in per_case]
        voxels = sum(int(column.sum()) for column in columns)
        slices = sum(int((column > 0).sum()) for column in columns)
        cases = sum(bool(column.any()) for column in columns)
        lines.append(f"{row['id']:>3} {row['name']:<22.22}{voxels:>14}{slices:>9}{cases:>8}")
    return lines


def _missing_lines(index: dict[str, Any]) -> list[str]:
    """Remarks on later problems: no test cases, values unlike CT, classes without a voxel."""
    cases, lines = index["cases"], []
    if not any(case["split"] == "test" for case in cases):
        lines.append(
            "no test cases, which --eval needs: pass --test_fraction 0.2, or evaluate a fold"
        )
    lows = [case["range"][0] for case in cases if case.get("range")]
    if lows and min(lows) > NO_AIR and isinstance(index.get("window"), list):
        lines.append(
            f"warning: no value is below {NO_AIR} HU, unlike in CT; for MR pass --window percentile"
        )
    totals = np.sum([np.sum(case["pixels"], axis=0) for case in cases], axis=0)
    if absent := [row["name"] for row in index["classes"] if not totals[row["id"]]]:
        lines.append(f"classes without a voxel: {', '.join(absent)}")
    return lines


def _geometry_lines(cases: list[dict[str, Any]]) -> list[str]:
    """Smallest, middle and largest spacing and size; the range of the raw values."""
    lines = []
    spacings = np.array([case["spacing"] for case in cases if case["spacing"]])
    if len(spacings):
        for name, axis in (("between slices", 0), ("in plane", 2)):
            low, middle, high = np.percentile(spacings[:, axis], (0, 50, 100))
            lines.append(f"spacing {name}: {low:.3g} to {high:.3g} mm, median {middle:.3g}")
    sizes = sorted({tuple(case["shape"][1:]) for case in cases})
    listed = ", ".join(f"{height} x {width}" for height, width in sizes[:4])
    lines.append(f"slice sizes: {listed}{', ...' if len(sizes) > 4 else ''}")
    ranges = [case["range"] for case in cases if case.get("range")]
    if ranges:
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        lines.append(f"raw values: {low:g} to {high:g}")
    return lines
