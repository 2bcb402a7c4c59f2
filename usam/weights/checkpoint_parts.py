"""Checks of the fields of a checkpoint of ours, which may come from anyone.

`usam.weights` asks here before anything of a checkpoint is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from usam.cli.choices import ADAPTERS, CLICKS, INPUTS, MIXED, PROMPT_MODES, TUNINGS
from usam.weights.torch_files import is_state_dict

FORMAT = 1
PLAIN = (int, float, str, bool, type(None))
MAX_SIDE = 8192  # pixels; the largest side a model is built for
MAPPINGS = ("model", "args", "data", "progress", "best", "optimizer", "scaler", "rng",
            "manifest", "in_epoch", "unvalidated")  # fmt: skip


def _is_list(value: object, kinds: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, kinds) for one in value)


def _is_size(value: object) -> bool:
    return isinstance(value, Real) and 0 < value < math.inf


DATA: dict[str, Callable[[Any], bool]] = {  # what must be true of "data" where it says it
    "classes": lambda value: _is_list(value, str) and 2 <= len(value) <= 256,
    "colors": lambda value: _is_list(value, (str, type(None))),
    "img_size": lambda value: type(value) is int and 0 < value <= MAX_SIDE,
    "window": lambda value: value is None or isinstance(value, str)
    or (_is_list(value, Real) and len(value) == 2),
    "orientation": lambda value: isinstance(value, str),
    "spacing": lambda value: value is None or _is_size(value),
    "crop": lambda value: isinstance(value, Real) and 0 <= value < 0.5,
    "prompt_mode": lambda value: (type(value) is int and value in PROMPT_MODES)
    or value in (MIXED, CLICKS),
    "input": lambda value: value in INPUTS,
    "adapter": lambda value: value in ADAPTERS,
    "tuning": lambda value: value in TUNINGS,
    "base": lambda value: isinstance(value, Mapping) and value.keys() == {"file", "sha256"}
    and _is_list([*value.values()], str),
    "num_point_embeddings": lambda value: value in (2, 4),
    "held_out": lambda value: value is None or _is_list(value, str),
    "cases": lambda value: isinstance(value, Mapping)
    and all(
        isinstance(value.get(key), Mapping) and _is_list([*value[key].values()], str)
        for key in ("trained_on", "chosen_by")
    ),
}  # fmt: skip


NEEDED = ("classes", "img_size")  # in "data" that is not empty
POSITION: dict[str, Callable[[Any], bool]] = {  # where training stands
    "progress": lambda part: (
        part.keys() <= {"epoch", "step", "samples", "skipped_in_a_row"}
        and all(type(value) is int and 0 <= value < 2**53 for value in part.values())
    ),
    "best": lambda part: (
        all(isinstance(value, PLAIN) for value in part.values())
        and (not part or {"epoch", "mean_dice"} <= part.keys())
    ),
}


def _is_average(value: object) -> bool:
    """Whether `value` is the state that usam.training.ema keeps in a checkpoint."""
    if not isinstance(value, Mapping) or value.keys() != {"num_updates", "weights"}:
        return False
    return type(value["num_updates"]) is int and is_state_dict(value["weights"])


def check_parts(content: Mapping[str, Any], source: Path) -> None:
    """Raises ValueError naming the malformed field of a checkpoint of ours.

    Weights are tensors by name, flags plain values; of "data" what is there must be usable.
    """
    wrong = [part for part in MAPPINGS if not isinstance(content.get(part, {}), Mapping)]
    if not wrong and not is_state_dict(content["model"]):
        wrong = ["model"]
    if not wrong and "average" in content and not _is_average(content["average"]):
        wrong = ["average"]
    if not wrong and not all(isinstance(value, PLAIN) for value in content["args"].values()):
        wrong = ["args"]
    wrong = wrong or [part for part, fits in POSITION.items() if not fits(content.get(part, {}))]
    data = content["data"]
    if not wrong and data:
        wrong = [f"data/{key}" for key in NEEDED if key not in data]
    if not wrong:
        wrong = [f"data/{key}" for key, fits in DATA.items() if key in data and not fits(data[key])]
    if wrong:
        raise ValueError(f"{source}: checkpoint field {wrong[0]!r} is malformed")


def whole_number(value: object, *, most: int) -> int:
    """A whole number from 0 to `most` in an untrusted file; 0 for anything else."""
    return value if type(value) is int and 0 <= value <= most else 0
