"""Training and validation cases: read from a checkpoint, recorded in the next one, printed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from dataset import SliceDataset, VolumeDataset
from dataset.splits import person
from dataset.store.folder import Store, check_class_names
from usam.evaluation.checks import CASES, used_cases
from usam.runtime.processes import say
from usam.weights.usam import read_checkpoint

Data = SliceDataset | VolumeDataset


def check_store(store: Store) -> None:
    """Raise ValueError for duplicate, empty or otherwise misleading class names."""
    check_class_names(store.classes, str(store.folder))


def held_out_of(args: Namespace, saved: Mapping[str, Any] | None, store: Store) -> dict[str, Any]:
    """The validation cases of a resumed run, as arguments of build_dataset and build_volumes.

    The cases that the checkpoint lists; for older checkpoints, those of the draw they were trained
    with. Where --val_fraction or the data have changed, which needs --override, a new draw.
    """
    if not saved or saved["args"].get("val_fraction") != args.val_fraction:
        return {}
    if "held_out" not in saved["data"]:
        return {"stratified": False}
    listed = saved["data"]["held_out"]
    persons = {person(case) for case in store.cases if case["split"] == "train"}
    return {"held_out": listed} if listed is not None and set(listed) <= persons else {}


def case_record(
    args: Namespace, saved: Mapping[str, Any] | None, train_data: Data, val_data: Data
) -> dict[str, Any]:
    """What checkpoints record of the cases: keys "held_out" and "cases" of their "data".

    held_out: ids of the drawn validation cases, None with --fold. cases: see `used_cases`; with
    those of the checkpoint a run is resumed or started from, and "incomplete" where one of them
    has no such record.
    """
    record = used_cases(train_data.case_digests, val_data.case_digests)
    incomplete = False
    for earlier in [saved, read_checkpoint(args.init) if getattr(args, "init", None) else None]:
        if not earlier:
            continue
        known = earlier["data"].get(CASES)
        for key, own in record.items():
            for case, digest in (known or {}).get(key, {}).items():
                own[case if own.get(case, digest) == digest else f"{case} (earlier)"] = digest
        same = earlier is saved and earlier["data"].get("digest") == train_data.store.digest
        incomplete |= bool((known or {}).get("incomplete")) or not (known or same)
    if incomplete:
        record["incomplete"] = True
        say("warning: the checkpoint this run starts from does not record its training cases, so "
            "--eval cannot tell whether a test case is among them")  # fmt: skip
    return {"held_out": train_data.held_out, CASES: record}


def describe_validation(args: Namespace, val_data: Data) -> None:
    """Print how the best epoch is chosen, and which classes the validation cases lack."""
    if not val_data:
        say("too few training cases for validation: best.pth is the last epoch")
        return
    missing = set(val_data.classes_not_shown) & set(args.classes or val_data.classes)
    if not can_validate(val_data):
        say("warning: no validation case shows foreground, so no epoch is validated: best.pth is "
            "the last epoch; change --seed or --val_fraction")  # fmt: skip
    elif missing:
        say(f"warning: no validation case shows {', '.join(sorted(missing))}; the best epoch is "
            "chosen without a score for it")  # fmt: skip
    if args.val_fraction == 0 and getattr(args, "fold", None) is None:
        say("--val_fraction 0: best.pth is chosen on the test cases, as published")


def can_validate(val_data: Data) -> bool:
    """Whether these cases show foreground; without it scores cannot rank epochs."""
    return bool(val_data) and len(val_data.classes_not_shown) < len(val_data.classes) - 1
