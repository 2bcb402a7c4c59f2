"""Training samples that cannot be read: skipped, reported and counted; too many end the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataset.store.slices import SliceStore
from tests.helpers.command import TRAINED, assert_refused, run
from tests.helpers.layouts import slice_store
from tests.helpers.toy import Slices, Toy, one_group, train
from usam.runtime.loaders import (
    UNREADABLE,
    SkipUnreadable,
    collate,
    max_unreadable,
    training_loader,
)
from usam.training.checkpoint import Progress
from usam.training.engine import Recipe


class Holes(Slices):
    """Slices of which some cannot be read."""

    def __init__(self, number: int, holes: set[int]) -> None:
        super().__init__(number)
        self.holes = holes

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if key[0] in self.holes:
            raise FileNotFoundError(f"slice{key[0]} is gone")
        return super().__getitem__(key)


def test_the_next_readable_sample_stands_in_and_says_why() -> None:
    data = SkipUnreadable(Holes(200, {5, 6, 199}))
    assert (data[5, 0]["id"], data[5, 0][UNREADABLE]) == ("slice7", "slice5 is gone")
    assert (data[199, 0]["id"], data[199, 0][UNREADABLE]) == ("slice0", "slice199 is gone")
    assert UNREADABLE not in data[4, 0]
    batch = collate([data[4, 0], data[5, 0]])
    assert (batch["id"], batch[UNREADABLE]) == (["slice4", "slice7"], ["slice5 is gone"])
    assert collate([data[4, 0]]).keys() == {"image", "mask", "id"}
    with pytest.raises(FileNotFoundError, match="is gone"):
        SkipUnreadable(Holes(200, set(range(10))))[0, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_epoch_counts_them_and_too_many_are_an_error(num_workers: int, capsys: Any) -> None:
    assert [max_unreadable(number) for number in (1, 99, 250)] == [1, 1, 2]

    def epoch(most: int) -> dict[str, Any]:
        data = Holes(300, {3, 70})
        loader = training_loader(data, batch_size=20, num_workers=num_workers, seed=5)
        model, recipe = Toy(), Recipe(seed=5, total_samples=300, most_unreadable=most)
        return train(model, loader, one_group(model), recipe=recipe, progress=Progress())

    assert epoch(2)["unreadable"] == 2
    assert (
        "warning: skipped an unreadable training sample: slice70 is gone" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"2 training samples .* 1 allowed.*is gone"):
        epoch(1)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut")])
def test_a_run_logs_the_counts_and_goes_on(
    tmp_path: Path, capsys: Any, damage: Callable[[Path], None]
) -> None:
    store, folder = slice_store(tmp_path / "store", train=5), tmp_path / "run"
    flags = [*TRAINED, "--data_root", store, "--output_dir", folder, "--val_fraction", "0"]
    path = store / "cases" / "train1.mask.npy"
    damage(path)
    # Three of fifteen slices are too many for what a hundred would forgive.
    assert_refused(run(capsys, *flags), path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("usam.runtime.loaders.UNREADABLE_SHARE", 0.3)
        result = run(capsys, *flags)
    assert result.code == 0, result.err
    for line in map(json.loads, (folder / "log.jsonl").open()):
        assert line["seen"] + line["skipped"] + line["unreadable"] == line["listed"] == 15
        assert (line["skipped"], line["unreadable"] > 0) == (3, True)


def test_a_file_cut_while_it_is_mapped_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    store = SliceStore(slice_store(tmp_path / "store"))
    store.read(0, 0)
    path = store.folder / "cases" / f"{store.cases[0]['file']}.image.npy"
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match="image.npy: became shorter while it was in use"):
        store.read(0, 2)
