"""Flags, data and versions of a run: written to manifest.json and compared on resuming."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.files import write_text
from usam.cli.flags import DECISIVE, DEFAULTS
from usam.runtime.processes import say
from usam.weights.checkpoint_parts import PLAIN

FORMAT = 1
PROJECT = Path(__file__).resolve().parents[2]
NOT_COMPARED = ("colors", "dataset", "prompt_mode", "held_out", "cases")  # of "data"
ONLY_PRINTED = ("epochs", "batch_size", "num_workers", "device", "amp", "compile")  # flags
SURROUNDINGS = {"world_size": "processes", "precision": "precision", "revision": "revision"}
STEP = "samples per step (--batch_size x processes)"


def facts_of(
    flags: Mapping[str, Any], data: Mapping[str, Any], *, world_size: int, precision: str
) -> dict[str, Any]:
    """Flags, data and versions of a run, as plain values.

    flags: by name. data: the checkpoint's "data", with the digest of the training data.
    """
    return {
        "arguments": plain(flags),
        "data": dict(data),
        "seed": flags["seed"],
        "world_size": world_size,
        "samples_per_step": flags["batch_size"] * world_size,
        "precision": precision,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "revision": revision(),
    }


def plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags by name, those that are not numbers, text or None as text."""
    return {name: v if isinstance(v, PLAIN) else str(v) for name, v in flags.items()}


def revision() -> str | None:
    """This project's git commit, with `-dirty` where files were changed; None without git."""
    if not (PROJECT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def check_unchanged(args: Namespace, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Print how this run, described by `facts`, differs from the run of the checkpoint `saved`.

    Raises ValueError if that changes the result and --override was not given, or if `saved` holds
    weights only.
    """
    if "optimizer" not in saved:
        raise ValueError(
            f"{args.resume} holds weights only; resume from last.pth, or evaluate it with --eval"
        )
    before = {"arguments": saved["args"], "data": saved["data"], **saved.get("manifest", {})}
    decisive = DEFAULTS[args.model].keys() & DECISIVE
    result, rest = differences(before, facts, decisive)
    if result and not args.override:
        raise ValueError(
            f"settings differ from {args.resume}: {'; '.join(result)}; restore them or pass "
            "--override"
        )
    if result:
        say(f"--override: the result changes: {'; '.join(result)}")
    if rest:
        say(f"changed since {args.resume}: {'; '.join(rest)}")


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], decisive: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Differences between two runs' facts: those that change the result, and those only printed.

    decisive: the flags whose value changes the result. What only one of the two holds, as with
    checkpoints older than the manifest, is not compared.
    """
    flags = {"--" + name: value for name, value in saved["arguments"].items()}
    flags_now = {"--" + name: value for name, value in now["arguments"].items()}
    data = {f"the data's {name}": value for name, value in saved["data"].items()}
    data_now = {
        f"the data's {name}": value
        for name, value in now["data"].items()
        if name not in NOT_COMPARED
    }
    result = [
        *changes({name: v for name, v in flags.items() if name[2:] in decisive}, flags_now),
        *changes(renamed(saved, {"samples_per_step": STEP}), {STEP: now["samples_per_step"]}),
        *changes(data, data_now),
    ]
    around, around_now = (
        renamed(facts, SURROUNDINGS) | facts.get("versions", {}) for facts in (saved, now)
    )
    printed = {name: v for name, v in flags.items() if name[2:] in ONLY_PRINTED}
    return result, [*changes(printed, flags_now), *changes(around, around_now)]


def renamed(facts: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The entries of `facts` that `names` lists, under the names given there."""
    return {names[key]: value for key, value in facts.items() if key in names}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One text for each value that differs between `old` and `new`, where both hold it."""
    texts = {name: (json.dumps(old[name]), json.dumps(new[name])) for name in old if name in new}
    return [
        f"{name} {short(after)} (was {short(before)})"
        for name, (before, after) in texts.items()
        if before != after
    ]


def short(text: str) -> str:
    """A value's first characters, enough to distinguish digests."""
    return text.strip('"') if len(text) <= 40 else text.strip('"')[:12] + "..."


def write(
    path: Path, facts: Mapping[str, Any], start: Mapping[str, Any], *, continues: bool
) -> None:
    """Write a run's `facts` to `path`, with the list of its starts, this one last.

    With `continues` the earlier starts are kept; an unreadable file counts as none.
    """
    starts = []
    if continues:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    whole = {"format": FORMAT, **facts, "starts": [*starts, start]}
    write_text(path, json.dumps(whole, indent=2, allow_nan=False) + "\n")
