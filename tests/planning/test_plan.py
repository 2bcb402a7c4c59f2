"""The plan of --recipe auto: a function of the data, the machine and measured times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.command import run
from tests.helpers.layouts import slice_store
from usam.cli import parser
from usam.cli.choices import PLANNED
from usam.planning import plan as rules
from usam.planning import recipe
from usam.planning.measure import summarize
from usam.planning.plan import CPU, GPU, Cost, Machine, Plan, Summary, plan
from usam.training.usam import load_split

HEART = Summary(
    cases=50, slices=400, val_slices=80, height=150, width=140, spacing=1.5,
    classes=("background", "ventricle", "scar"), shares=(0.9, 0.09, 0.01), shown=(1, 0.9, 0.2),
)  # fmt: skip
ON_CPU, ON_GPU = Machine(CPU, "the CPU"), Machine(GPU, "a GPU")


def costs(second_a_megapixel: float, memory: float = 0.0) -> Callable[[dict], Cost]:
    """Costs in proportion to the pixels of a batch; memory: share that a megapixel takes."""

    def measure(flags: dict[str, Any]) -> Cost:
        pixels = flags["img_size"] ** 2 / 1e6
        step = second_a_megapixel * pixels * flags["batch_size"]
        memory_share = memory * pixels * flags["batch_size"]
        return Cost(step, second_a_megapixel * pixels / 4, memory_share, spent=1.0)

    return measure


def planned(data: Summary = HEART, machine: Machine = ON_CPU, **changes: Any) -> Plan:
    how = {"given": {}, "budget": 1800.0, "measure": costs(1.0), "at_hand": lambda model: False}
    return plan(data, machine, **how | changes)


def test_all_flags_are_planned_from_the_data_and_the_time() -> None:
    made = planned()
    assert made.flags.keys() == set(PLANNED)
    assert made.flags["img_size"] == 160
    assert made.flags["batch_size"] == 8
    # 50 steps of 0.2048 s and 80 slices of 0.0064 s an epoch, nine tenths of 1799 s
    assert made.flags["epochs"] == int(1799 * 0.9 / (50 * 0.2048 + 80 * 0.0064)) == 150
    assert (made.flags["class_weights"], made.flags["foreground_share"]) == ("balanced", 0.33)
    assert made.flags["ema"] == pytest.approx(1 - 1 / 75, abs=1e-4)
    assert any("scar has 1.00% of the pixels" in line for line in made.lines)
    assert all(line.startswith("--") and ": " in line for line in made.lines)


def test_images_become_smaller_until_enough_steps_fit() -> None:
    slow = planned(measure=costs(60.0)).flags  # 12.3 s a step at 160 pixels
    assert slow["img_size"] == 128  # 146 steps at 160 pixels, 229 at 128
    assert planned(measure=costs(60.0), given={"img_size": 160}).flags["img_size"] == 160


def test_a_budget_below_an_epoch_says_how_long_one_takes() -> None:
    with pytest.raises(
        ValueError, match=r"--budget 10s: one epoch \(400 slices at 64 pixels\)"
    ) as e:
        planned(budget=10.0, measure=costs(60.0))
    needed = parser.parse_flags(["--recipe", "auto", "--budget", str(e.value).split()[-3]]).budget
    assert planned(budget=needed, measure=costs(60.0), given={"img_size": 64}).flags["epochs"] >= 1


def test_the_model_is_the_first_whose_weights_are_there() -> None:
    assert planned().flags["sam_weight"] == "none"
    for there, model in ((("vit_b", "vit_t"), "vit_b"), (("vit_t",), "vit_t"), ((), "vit_tiny")):
        flags = planned(machine=ON_GPU, at_hand=there.__contains__).flags
        assert flags["sam_model"] == model
        assert flags.get("sam_weight") == (None if there else "none")
        assert flags["warmup"] is not bool(there)
        assert flags["img_size"] == 224


def test_what_the_memory_does_not_hold_becomes_smaller() -> None:
    large = replace(HEART, height=512, width=500)
    assert planned(large, ON_GPU, measure=costs(0.01)).flags["img_size"] == 512
    less = planned(large, ON_GPU, measure=costs(0.01, memory=0.2)).flags
    assert (less["img_size"], less["batch_size"]) == (512, 12)
    least = planned(large, ON_GPU, measure=costs(0.01, memory=1.2)).flags
    assert (least["img_size"], least["batch_size"]) == (384, 4)
    too_large = {"given": {"img_size": 512}, "measure": lambda _: Cost(math.inf, 0, math.inf)}
    with pytest.raises(ValueError, match="512 pixels and batches of 4 do not fit into the memory"):
        planned(large, ON_GPU, **too_large)


def test_given_flags_win_and_are_planned_around() -> None:
    given = {"img_size": 64, "ema": 0.0, "sam_model": "vit_t", "lr": 0.5, "epochs": 3}
    made = planned(given=given, measure=pytest.fail)  # nothing to measure
    assert {name: made.flags[name] for name in given} == given
    assert made.flags["lr_vit"] == rules.RATES[True]["lr_vit"]
    assert not any(line.startswith(("--img_size", "--epochs", "--ema")) for line in made.lines)
    assert planned(given={"sam_model": "vit_tiny"}).flags["warmup"]
    assert not planned(given={"sam_model": "vit_tiny", "init": "x.pth"}).flags["warmup"]


@pytest.mark.parametrize("changes", [
    {"cases": 1, "slices": 3, "val_slices": 0},
    {"cases": 1, "slices": 1, "val_slices": 0, "spacing": None},
    {"classes": ("background", "a"), "shares": (1, 0), "shown": (1, 0)},
])  # fmt: skip
def test_the_smallest_stores_have_a_plan(changes: dict[str, Any]) -> None:
    flags = planned(replace(HEART, **changes)).flags
    assert 1 <= flags["epochs"] <= rules.MAX_EPOCHS
    assert 2 <= flags["batch_size"] <= 8


# ------------------------------------------------------------------------------- whole runs


def settled(*given: str, saved: dict[str, Any] | None = None) -> Any:
    args = parser.parse_flags(list(given))
    parser.fill_defaults(args, saved)
    return args


def test_only_stores_are_planned_by_default(capsys: pytest.CaptureFixture) -> None:
    assert settled("--dataset", "store").recipe == "auto"
    assert settled("--dataset", "store").img_size is None
    assert settled("--dataset", "store", "--recipe", "strong").batch_size == 24
    for name in ("rectum", "word", "phantom"):
        assert settled("--dataset", name).recipe == "published"
    for words in ("--budget 2h", "--dataset store --recipe strong --budget 2h",
                  "--dataset store --epochs 3 --budget 2h", "--resume x --budget 2h",
                  "--dataset store --budget 2", "--dataset store --budget 0s"):  # fmt: skip
        with pytest.raises(SystemExit):
            parser.parse_flags(words.split())
        assert "--budget" in capsys.readouterr().err


def test_resuming_never_plans() -> None:
    saved = {"args": {**vars(settled("--dataset", "rectum")), "output_dir": "x"}, "data": {}}
    with pytest.raises(ValueError, match="auto plans new trainings only"):
        settled("--resume", "x", "--recipe", "auto", saved=saved)
    saved["args"]["recipe"] = "auto"
    saved["args"]["img_size"] = 48
    args = settled("--resume", "x", "--recipe", "auto", saved=saved)
    assert (args.recipe, args.img_size) == ("auto", 48)


def test_the_summary_is_of_the_training_slices(store: Path) -> None:
    args = settled("--dataset", "store", "--data_root", str(store), "--recipe", "strong")
    found = load_split(args, "train", None, {})
    summary = summarize(found, load_split(args, "val", None, {}))
    pixels = torch.tensor(found.class_pixels, dtype=torch.float64)
    assert summary.slices == len(found)
    assert summary.shares == pytest.approx((pixels / pixels.sum()).tolist())
    assert summary.shown[1] == pytest.approx(len(found.by_class[0]) / len(found))
    assert (summary.height, summary.width) == tuple(found.store.cases[0]["shape"][1:])


def test_a_planned_run_trains_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = slice_store(tmp_path / "store", train=2, num_slices=2)
    monkeypatch.setattr(recipe, "measure", lambda *_: Cost(step=10.0, slice=0.1))
    monkeypatch.setitem(rules.SIDES, CPU, (32, 32))
    common = "--data_root", root, "--device", "cpu", "--num_workers", "0", "--output_dir", tmp_path
    short = run(capsys, "--dataset", "store", *common, "--budget", "9s")
    assert (short.code, "one epoch" in short.err) == (2, True)
    new = run(capsys, "--dataset", "store", *common, "--budget", "40s")
    assert new.code == 0, new.err
    assert "--recipe auto: 2 cases" in new.out
    assert "--img_size 32: " in new.out
    kept = torch.load(tmp_path / "last.pth", weights_only=True)
    made = kept["manifest"]["plan"]
    assert made["flags"].items() <= kept["args"].items()
    assert (made["budget"], made["flags"]["epochs"], made["device"]) == (40, 1, "the CPU")

    monkeypatch.setattr(recipe, "machine_of", lambda _: ON_GPU)
    more = run(capsys, *common, "--resume", tmp_path / "last.pth", "--epochs", "2")
    assert more.code == 0, more.err
    assert "planned for the CPU, resumed on a GPU" in more.out
    assert torch.load(tmp_path / "last.pth", weights_only=True)["manifest"]["plan"] == made
