"""Checks that a checkpoint suits the evaluation data: classes, preparation and cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset.text import counted, printable
from usam.evaluation.case_metrics import TOLERANCES
from usam.weights.usam import points_are_row_col

# Keys of a checkpoint's "data" that must equal the data set's; a published checkpoint has no others
# than these two.
COMPARED = ("classes", "window", "orientation", "spacing", "clahe", "crop", "body_crop")
PUBLISHED = ("orientation", "clahe")
CASES = "cases"  # key of a checkpoint's "data": see `used_cases`
MOST_NAMED = 5
Checkpoint = tuple[Path, Mapping[str, Any]]  # where it lies, and its content


class HeldOut(NamedTuple):
    """The evaluated cases that a checkpoint was trained on, and those that chose its epoch."""

    trained_on: list[str]
    chosen_by: list[str]


def used_cases(trained_on: Mapping[str, str], chosen_by: Mapping[str, str]) -> dict[str, Any]:
    """The record of a training's cases that its checkpoints keep as data["cases"].

    Digests of the images' content by case id: of the cases trained on, and of those whose scores
    choose the best epoch.
    """
    return {"trained_on": dict(trained_on), "chosen_by": dict(chosen_by)}


def held_out(saved: Mapping[str, Any], digests: Mapping[str, str]) -> HeldOut | None:
    """Which of the cases with `digests` (by case id) the checkpoint has used; None if unknown.

    Cases are compared by content, whatever their names and splits are called.
    """
    used = saved["data"].get(CASES)
    if not used:
        return None
    return HeldOut(
        *(
            sorted(case for case, digest in digests.items() if digest in set(used[key].values()))
            for key in HeldOut._fields
        )
    )


def any_record(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether a checkpoint records its cases; if not, digests need not be computed."""
    return any(content["data"].get(CASES) for _, content in checkpoints)


def check_held_out(
    checkpoints: Sequence[Checkpoint], digests: Mapping[str, str], *, override: bool
) -> tuple[dict[str, Any], list[str]]:
    """What metrics.json says of the cases' use in training, and lines for the report.

    {"trained_on": case ids, "chosen_by": case ids} over all checkpoints, each None where a
    checkpoint does not record its cases. Raises ValueError for a case that was trained on, without
    `override`.
    """
    found = [(path, held_out(content, digests)) for path, content in checkpoints]
    unknown = [
        str(path)
        for path, content in checkpoints
        if (content["data"].get(CASES) or {"incomplete": True}).get("incomplete")
    ]
    known = [used for _, used in found if used is not None]
    trained_on, chosen_by = (
        sorted({case for used in known for case in getattr(used, key)}) for key in HeldOut._fields
    )
    for path, used in found:
        if used and used.trained_on and not override:
            raise ValueError(
                f"{path} was trained on {counted(len(used.trained_on), 'case')} of this "
                f"evaluation: {names(used.trained_on)}; evaluate other cases, or pass --override"
            )
    lines = []
    total = counted(len(digests), "case")
    if trained_on:
        lines.append(f"overridden: trained on {len(trained_on)} of {total}: {names(trained_on)}")
    if chosen_by:
        lines.append(f"best epoch chosen by {len(chosen_by)} of {total}: {names(chosen_by)}")
    if unknown:
        lines.append(
            f"unknown whether the cases were trained on: {', '.join(unknown)} has no record of its "
            "training cases"
        )
    elif not trained_on and not chosen_by:
        lines.append("no case was trained on or used to choose the best epoch")
    cases = {"trained_on": trained_on, "chosen_by": chosen_by}
    return cases if not unknown else dict.fromkeys(cases), lines


def check_preparation(
    checkpoints: Sequence[Checkpoint], info: Mapping[str, Any], *, override: bool
) -> list[str]:
    """Lines for the report: where the data differ from those a checkpoint was trained on.

    info: that of the data set. What a checkpoint does not hold is not compared. Raises ValueError
    for another number of classes, and without `override` for any difference.
    """
    lines = []
    for path, content in checkpoints:
        trained = content["data"]
        if len(trained["classes"]) != len(info["classes"]):
            raise ValueError(
                f"{path} was trained on {counted(len(trained['classes']), 'class')}, the data set "
                f"has {len(info['classes'])}"
            )
        found = [
            f"{name} {info[name]} (checkpoint: {trained[name]})"
            for name in (PUBLISHED if points_are_row_col(content) else COMPARED)
            if name in trained and info[name] != trained[name]
        ]
        text = printable("; ".join(found))
        if found and not override:
            raise ValueError(
                f"{path} was trained on other data: {text}; prepare the data in the same way, or "
                "pass --override"
            )
        lines += [f"overridden: data differ from those of {path}: {text}"] if found else []
    return lines


def small_tolerances(
    voxels: Iterable[Sequence[float]], tolerances: Sequence[float] = TOLERANCES
) -> list[str]:
    """Lines for the report: the tolerances of the NSD below the longest side of a voxel, in mm."""
    longest = max(max(voxel) for voxel in voxels)
    return [
        f"NSD at {tolerance:g} mm: the tolerance is below the voxel size (up to {longest:g} mm); "
        "surfaces one such voxel apart count as wrong"
        for tolerance in tolerances
        if tolerance < longest
    ]


def names(cases: Iterable[str]) -> str:
    """The first few case names, for a message."""
    cases = [printable(case) for case in cases]
    shown = ", ".join(cases[:MOST_NAMED])
    more = len(cases) - MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
