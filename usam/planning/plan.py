"""The plan of --recipe auto: settings of a training, from its data, its device and its time.

As in nnU-Net's planner (Isensee et al. 2021) the data give the image size and the memory the batch;
here the time is a limit as well. Nothing is measured or read here: `plan` is a function of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataset.sides import sides
from dataset.text import counted, printable
from usam.cli.values import duration_text

CPU, GPU = "CPU", "GPU"


class Start(NamedTuple):
    """A model to train.

    weights: it starts from SAM's file, if that is there, else from random weights. budget: seconds
    from which on it is chosen.
    """

    sam_model: str
    weights: bool
    tuning: str = "full"
    budget: float = 0


# ----------------------------------------------------------------- what measurements may change

STARTS = {  # the first that fits
    CPU: (Start("vit_tiny", weights=False),),
    GPU: (
        Start("vit_b", weights=True),
        Start("vit_t", weights=True),
        Start("vit_tiny", weights=False),
    ),
}
RATES = {  # by whether a training starts from weights
    True: {"lr": 1e-3, "lr_vit": 1e-4, "lr_backbone": 1e-4, "warmup": False},
    False: {"lr": 8e-4, "lr_vit": 4e-5, "lr_backbone": 1e-3, "warmup": True},
}
BUDGET = 30 * 60.0  # seconds
BATCH = {CPU: 8, GPU: 24}
SIDES = {CPU: (64, 256), GPU: (224, 512)}  # pixels: the smallest and the largest image
STEP = 16  # pixels, between the sizes that a model may have
LADDER = (512, 448, 384, 320, 256, 224, 192, 160, 128, 96, 64)  # sizes on the way down
LEAST_BATCH = 4  # where the memory is short
MIN_STEPS = 200  # optimizer steps; images become smaller until as many fit
MAX_EPOCHS = 1000  # nnU-Net's number
MEMORY = 0.85  # share of the GPU's that a step may take
IN_STEPS = 0.9  # share of the time that is left for steps and validation: the rest saves and draws
RARE = 0.5  # a class on a smaller share of the slices is drawn more often
SHARE_BY_CLASS = 0.33  # of the slices, where a class is rare: nnU-Net's share
AVERAGED = 0.01  # of all steps are averaged
EMA = (0.98, 0.999)  # the smallest and the largest decay

# ------------------------------------------------------------------------- what a plan is made from

# Flags that choose the model to start from: where one is given, the plan does not.
MODEL_FLAGS = ("sam_model", "sam_weight", "init", "lora_weight", "tuning")


@dataclass(frozen=True)
class Summary:
    """A training's data: numbers of cases and slices, and what the slices look like.

    height, width: medians in pixels. spacing: median in mm in plane, None where unknown.
    classes: names, background first. shares: of the pixels, a class each. shown: share of the
    slices that show a class. The last three are of the training slices.
    """

    cases: int
    slices: int
    val_slices: int
    height: int
    width: int
    spacing: float | None
    classes: tuple[str, ...]
    shares: tuple[float, ...]
    shown: tuple[float, ...]


@dataclass(frozen=True)
class Machine:
    """What trains: CPU or GPU, its name, the number of processes."""

    kind: str
    name: str
    processes: int = 1


class Cost(NamedTuple):
    """What was measured of a candidate.

    step: seconds of an optimizer step. slice: seconds to validate a slice. memory: share of the
    device's, above 1 where a step did not fit. spent: seconds the measurement took.
    """

    step: float
    slice: float
    memory: float = 0.0
    spent: float = 0.0


Flags = dict[str, Any]
Measure = Callable[[Flags], Cost]  # the cost of a training with these flags


@dataclass
class Plan:
    """Flags by name, and a line for each decision. Flags that were given are never changed."""

    given: Mapping[str, Any]
    flags: Flags = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def set(self, reason: str, **values: Any) -> None:
        """Decide flags together, with a line that says why unless `reason` is empty.

        Those that are given keep their values and are not explained.
        """
        open_ = {name: value for name, value in values.items() if name not in self.given}
        self.flags |= values | {name: self.given[name] for name in values if name in self.given}
        shown = " ".join(text for name, value in open_.items() if (text := flag_text(name, value)))
        if shown and reason:
            self.lines.append(f"{shown}: {reason}")


def flag_text(name: str, value: Any) -> str:
    """A flag as on the command line; "" for a switch that is off."""
    if isinstance(value, bool):
        return f"--{name}" if value else ""
    if name == "foreground_share":
        return f"--{name} {value:.0%}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


# ------------------------------------------------------------------------------------- the plan


def plan(
    data: Summary,
    machine: Machine,
    *,
    given: Mapping[str, Any],
    budget: float,
    measure: Measure,
    at_hand: Callable[[str], bool],
) -> Plan:
    """The flags of PLANNED for `data` on `machine`, with a reason each.

    given: flags that the user gave, which win. budget: seconds for all epochs with their
    validation; not used where the epochs are given. measure: the cost of a candidate. at_hand:
    whether SAM's file for a --sam_model is there. Raises ValueError where no epoch fits.
    """
    made = Plan(given)
    plan_model(made, machine, budget, at_hand)
    plan_sampling(made, data)
    costs = fit(made, data, machine, None if "epochs" in given else budget, measure)
    plan_epochs(made, data, machine, budget, costs)
    return made


def plan_model(made: Plan, machine: Machine, budget: float, at_hand: Callable) -> None:
    """The model and its learning rates: the first of STARTS whose weights are there."""
    given = made.given
    if any(name in given for name in MODEL_FLAGS):
        model = given.get("sam_model", "vit_b")
        made.set("", sam_model=model, tuning="full")
        random = given.get("sam_weight", "none" if model == "vit_tiny" else None) == "none"
        weights = "init" in given or not random
    else:
        in_time = (start for start in STARTS[machine.kind] if budget >= start.budget)
        start = next(s for s in in_time if not s.weights or at_hand(s.sam_model))
        weights, reason = start.weights, "small enough for a CPU"
        if weights:
            reason = "starts from the weights that are there"
        elif machine.kind == GPU:
            reason = "no weights of SAM are there, see weight/README.md"
        random_weights = {} if weights else {"sam_weight": "none"}
        made.set(reason, sam_model=start.sam_model, **random_weights, tuning=start.tuning)
    made.set(f"to start from {'trained' if weights else 'random'} weights", **RATES[weights])


def plan_sampling(made: Plan, data: Summary) -> None:
    """Augmentation, class weights and which slices are drawn."""
    found = sides(data.classes)
    reason = "small rotations, scaling, shifts, gamma and noise"
    reason += "; no flips, as classes have sides" if found.any else ", without flips"
    made.set(reason, augment="strong")
    rows = list(zip(data.shares, data.shown, data.classes, strict=True))[1:]
    rarest = min((row for row in rows if row[0]), default=None)
    if rarest is None:
        made.set("no class is shown", class_weights="none", foreground_share=0.0)
        return
    reason = f"{printable(rarest[2])} has {rarest[0]:.2%} of the pixels"
    made.set(reason, class_weights="balanced")
    _, shown, name = min((row for row in rows if row[0]), key=lambda row: row[1])
    rare = shown < RARE
    where = f"{printable(name)} is on {shown:.0%} of the slices"
    made.set(where, foreground_share=SHARE_BY_CLASS if rare else 0.0)


def fit(
    made: Plan, data: Summary, machine: Machine, budget: float | None, measure: Measure
) -> list[Cost]:
    """Set image and batch size by the data, made smaller for memory and time; what was measured.

    The last measurement is of the sizes that were set; without a budget, a CPU measures nothing.
    Raises ValueError where the memory does not even hold the smallest.
    """
    sizes, why = first_sizes(made, data, machine)
    costs: list[Cost] = []
    sizes_open = not sizes.keys() <= made.given.keys()
    while budget or (machine.kind == GPU and sizes_open):
        cost = measure(made.flags | sizes)
        costs.append(cost)
        change = None
        if cost.memory > MEMORY:
            change = less_memory(sizes, made.given, machine)
            reason = "what the memory holds"
        elif budget:
            needed = seconds_needed(sizes["batch_size"], data, machine, cost)
            change = less_time(sizes, made.given, machine, needed / budget)
            reason = f"{why['img_size']}; smaller, so that enough steps fit into the time"
        if change is None:
            break
        sizes |= change
        why |= dict.fromkeys(change, reason)
    if costs and math.isinf(costs[-1].step):
        size = f"{sizes['img_size']} pixels and batches of {sizes['batch_size']}"
        raise ValueError(f"{size} do not fit into the memory of {machine.name}; pass smaller ones")
    for name, value in sizes.items():
        made.set(why[name], **{name: value})
    return costs


def first_sizes(made: Plan, data: Summary, machine: Machine) -> tuple[Flags, dict[str, str]]:
    """Image and batch size by the data alone, and why."""
    smallest, largest = SIDES[machine.kind]
    median = math.ceil(max(data.height, data.width) / STEP) * STEP
    side = min(max(median, smallest), largest)
    batch = min(BATCH[machine.kind], max(2, data.slices // 4))
    why = f"the median slice is {data.height} x {data.width} pixels"
    why += f" of {data.spacing:.2g} mm" if data.spacing else ""
    why += "" if side == median else f"; {smallest} to {largest} on a {machine.kind}"
    sizes = {"img_size": side, "batch_size": batch}
    sizes |= {name: made.given[name] for name in sizes if name in made.given}
    slices = f"{counted(data.slices, 'training slice')} on a {machine.kind}"
    return sizes, {"img_size": why, "batch_size": slices}


def less_memory(sizes: Flags, given: Mapping[str, Any], machine: Machine) -> Flags | None:
    """The next size that takes less memory: half the batch, then smaller images; None for none."""
    side, batch, smallest = sizes["img_size"], sizes["batch_size"], SIDES[machine.kind][0]
    if batch > LEAST_BATCH and "batch_size" not in given:
        return {"batch_size": max(batch // 2, LEAST_BATCH)}
    return {"img_size": below(side, smallest)} if can_shrink(side, given, smallest) else None


def less_time(
    sizes: Flags, given: Mapping[str, Any], machine: Machine, excess: float
) -> Flags | None:
    """The next image size at which the time should do; None where it does, or nothing is smaller.

    excess: how many times too long a training would be.
    """
    side, smallest = sizes["img_size"], SIDES[machine.kind][0]
    less = side
    while can_shrink(less, given, smallest) and excess * (less / side) ** 2 > 1:
        less = below(less, smallest)
    return {"img_size": less} if less < side else None


def can_shrink(side: int, given: Mapping[str, Any], smallest: int) -> bool:
    """Whether images may be made smaller than `side`."""
    return side > smallest and "img_size" not in given


def below(side: int, smallest: int) -> int:
    """The next smaller size of LADDER, not below `smallest`."""
    return max(next((size for size in LADDER if size < side), smallest), smallest)


def steps_of_epoch(batch: int, data: Summary, machine: Machine) -> int:
    """Optimizer steps of an epoch, for batches of this size in each process."""
    return data.slices // min(batch * machine.processes, data.slices)


def epoch_seconds(batch: int, data: Summary, machine: Machine, cost: Cost) -> float:
    """How long an epoch takes, with its validation, checkpoint and curves."""
    validation = math.ceil(data.val_slices / machine.processes) * cost.slice
    return (steps_of_epoch(batch, data, machine) * cost.step + validation) / IN_STEPS


def seconds_needed(batch: int, data: Summary, machine: Machine, cost: Cost) -> float:
    """The shortest time for a training: MIN_STEPS, and a whole epoch."""
    return max(MIN_STEPS * cost.step / IN_STEPS, epoch_seconds(batch, data, machine, cost))


def plan_epochs(
    made: Plan, data: Summary, machine: Machine, budget: float, costs: Sequence[Cost]
) -> None:
    """How many epochs fit into the time, and how many steps are averaged.

    Raises ValueError where none does.
    """
    batch, epochs, reason = made.flags["batch_size"], made.given.get("epochs"), ""
    if epochs is None:
        seconds = epoch_seconds(batch, data, machine, costs[-1])
        spent = sum(cost.spent for cost in costs)
        epochs = min(int((budget - spent) / seconds), MAX_EPOCHS)
        if epochs < 1:
            raise ValueError(
                f"--budget {duration_text(budget)}: one epoch ({counted(data.slices, 'slice')} at "
                f"{made.flags['img_size']} pixels) takes about {duration_text(seconds)} on "
                f"{machine.name}; pass --budget {enough(spent + seconds)} or more"
            )
        reason = f"one takes about {duration_text(seconds)}, as measured; --budget "
        reason += duration_text(budget)
    made.set(reason, epochs=epochs)
    steps = steps_of_epoch(batch, data, machine) * epochs
    decay = min(max(1 - 1 / (AVERAGED * steps), EMA[0]), EMA[1])
    made.set(f"averages about {round(1 / (1 - decay))} of {steps:,} steps", ema=round(decay, 4))


def enough(seconds: float) -> str:
    """A --budget somewhat above `seconds`, in whole seconds or minutes."""
    seconds *= 1.1
    return f"{math.ceil(seconds / 60)}m" if seconds > 100 else f"{math.ceil(seconds)}s"
