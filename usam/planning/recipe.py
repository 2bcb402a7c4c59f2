"""--recipe auto in a run: the plan is made once, printed, and kept in the checkpoint."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from dataset import open_store
from dataset.text import counted
from usam.cli.choices import AUTO_RECIPE, PLANNED
from usam.cli.values import duration_text
from usam.planning.measure import machine_of, measure, summarize
from usam.planning.plan import BUDGET, MODEL_FLAGS, Cost, Flags, Machine, Plan, Summary, plan
from usam.runtime import processes
from usam.runtime.precision import Precision
from usam.runtime.processes import say
from usam.training.cases import check_store
from usam.training.usam import load_split
from usam.weights.sam import at_hand

Kept = dict[str, Any]


def settle(args: Namespace, precision: Precision, saved: dict[str, Any] | None) -> Kept | None:
    """The plan of a run of --recipe auto, for its checkpoints; None of another recipe.

    A new run's flags are filled in as the main process plans them; a resumed one's were, so that
    it only says when it was planned for another device. Raises ValueError where nothing fits.
    """
    if args.recipe != AUTO_RECIPE:
        return None
    if saved:
        kept = saved.get("manifest", {}).get("plan")
        if not isinstance(kept, dict):
            return None
        check_device(kept, machine_of(precision.device))
        return kept
    kept = json.dumps(make(args, precision)) if processes.is_main() else ""
    kept = json.loads(processes.gather_texts(kept)[0])
    for name, value in kept["flags"].items():
        setattr(args, name, value)
    args.budget = kept["budget"]
    for line in kept["lines"]:
        say(line)
    return kept


def make(args: Namespace, precision: Precision) -> Kept:
    """A plan for the data and the device of a new run, as plain values."""
    store = open_store(args.dataset, args.data_root)
    check_store(store)
    given = {name: getattr(args, name) for name in (*PLANNED, *MODEL_FLAGS)}
    given = {name: value for name, value in given.items() if value is not None}
    any_size = Namespace(**vars(args) | {"img_size": 16})
    train, val = (load_split(any_size, split, store, {}) for split in ("train", "val"))
    data, machine = summarize(train, val), machine_of(precision.device)

    def cost(flags: Flags) -> Cost:
        tried = Namespace(**vars(args) | flags)
        return measure(tried, precision, load_split(tried, "train", store, {}))

    budget = args.budget or BUDGET
    made = plan(data, machine, given=given, budget=budget, measure=cost, at_hand=at_hand)
    timed = "epochs" not in given
    return {
        "device": machine.name,
        "kind": machine.kind,
        "budget": budget if timed else None,
        "flags": made.flags,
        "lines": [headline(data, machine, budget if timed else None), *indented(made)],
    }


def headline(data: Summary, machine: Machine, budget: float | None) -> str:
    """What is planned for: data, time and machine."""
    classes = counted(len(data.classes) - 1, "class", "classes")
    return (
        f"--recipe auto: {counted(data.cases, 'case')}, {counted(data.slices, 'slice')} of "
        f"{classes} for training, {counted(data.val_slices, 'slice')} for validation"
        + (f", {duration_text(budget)}" if budget else "")
        + f", on {machine.name}"
    )


def indented(made: Plan) -> list[str]:
    """The decisions, a line each."""
    return [f"  {line}" for line in made.lines]


def check_device(kept: Kept, machine: Machine) -> None:
    """Say that a plan was made for another device than this."""
    if machine.name != kept.get("device"):
        before = kept.get("device")
        say(f"warning: planned for {before}, resumed on {machine.name}: an epoch may take another "
            "time; a training without --resume is planned for this device")  # fmt: skip
