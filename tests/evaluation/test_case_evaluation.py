"""Cases scored while slices pass: native size, crops undone, sizes joined, shares of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataset.slices import SliceDataset
from dataset.store.slices import SliceStore, write_case, write_index
from tests.helpers.toy import FLOAT32
from usam.evaluation import cases as case_evaluation
from usam.evaluation.cases import NUM_WORST, evaluate_cases, known_spacings, shown_box
from usam.evaluation.pixels import count_pixels
from usam.runtime import samplers
from usam.runtime.loaders import evaluation_loader
from usam.runtime.processes import gather_texts
from usam.runtime.samplers import CaseShard

HOW = {"prompt_mode": 0, "precision": FLOAT32}
RUN = {"spacing": None, "batch_size": 4, "num_workers": 0} | HOW


class Thresholds(nn.Module):
    """Labels 1 and 2 where the image is brighter than 60 and 180: the stores' truth."""

    num_classes = 3

    def forward(self, image: Tensor, **prompts: Any) -> Tensor:
        levels = torch.stack(
            [image[:, 0] * 0 + 100 / 255, image[:, 0], image[:, 0] * 2 - 200 / 255]
        )
        return (levels * 1000).movedim(0, 1)


def case(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """A mask (S, H, W) with a block of each class in every slice."""
    mask = np.zeros(shape, np.uint8)
    for label in (1, 2):
        y, x = rng.integers(2, min(shape[1:]) - 10, 2)
        mask[:, y : y + 7, x : x + 8] = label
    return mask


def make(folder: Path, entries: list[tuple[str, str, np.ndarray, Any]], **how: Any) -> SliceDataset:
    """A data set of test cases (id, file, mask, spacing) whose images tell their labels."""
    written = []
    for name, file, mask, spacing in entries:
        entry = {"id": name, "split": "test", "file": file, "spacing": spacing}
        entry["slices"] = [f"{file}_slice{k}" for k in range(len(mask))]
        written.append(write_case(folder, entry, mask * 120, mask))
    classes = [
        {"id": i, "name": n, "color": None} for i, n in enumerate(("rest", "organ", "tumour"))
    ]
    write_index(
        folder, {"classes": classes, "orientation": "LPS", "clahe": False, "cases": written}
    )
    store = SliceStore(folder)
    return SliceDataset(store, store.slices("test"), **{"img_size": 32} | how)


@pytest.fixture
def data(tmp_path: Path) -> SliceDataset:
    rng = np.random.default_rng(0)
    return make(
        tmp_path, [(f"case{n}", f"case{n}", case(rng, (3, 32, 32)), [5, 1, 2]) for n in range(3)]
    )


def test_a_perfect_model_scores_perfectly_and_counts_stay_as_they_were(data: SliceDataset) -> None:
    counts, cases = evaluate_cases(Thresholds(), data, **RUN)
    loader = evaluation_loader(data, num_workers=0, batch_size=4)
    assert torch.equal(counts.tensors, count_pixels(Thresholds(), loader, **HOW).tensors)
    assert list(cases.rows) == ["case0", "case1", "case2"]
    assert cases.in_mm
    assert cases.num_slices == {"case0": 3, "case1": 3, "case2": 3}
    row = cases.rows["case1"][1]
    assert (row["dice"], row["hd95"], row["nsd_1"], row["empty"]) == (1, 0, 1, "")
    assert row["true_volume"] == pytest.approx(7 * 8 * 3 * 10 / 1000)


def test_batches_that_end_within_a_case_change_nothing(data: SliceDataset) -> None:
    wanted = evaluate_cases(Thresholds(), data, **RUN)[1]
    for batch_size in (1, 9):
        found = evaluate_cases(Thresholds(), data, **RUN | {"batch_size": batch_size})[1]
        assert found == wanted
    assert evaluate_cases(Thresholds(), data, **RUN | {"num_workers": 2})[1] == wanted


def test_figures_are_those_of_the_stored_size(tmp_path: Path) -> None:
    """A line one pixel wide vanishes at a quarter of the size; its truth is read from the store."""
    mask = np.zeros((2, 128, 128), np.uint8)
    mask[:, 40:80, 32:92] = 1
    mask[:, 17, 20:100] = 2
    data = make(tmp_path, [("a", "a", mask, [1, 1, 1])])
    (rows,) = evaluate_cases(Thresholds(), data, **RUN)[1].rows.values()
    assert rows[0]["true_volume"] * 1000 == pytest.approx(2 * 40 * 60)
    assert rows[1]["true_volume"] * 1000 == pytest.approx(2 * 80)
    assert 0.85 < rows[0]["dice"] < 1


def test_a_crop_is_undone_and_what_it_hid_is_missed(tmp_path: Path) -> None:
    mask = np.zeros((2, 40, 48), np.uint8)
    mask[:, 10:20, 12:30] = 1
    mask[:, 0:3, 0:3] = 2  # cut off
    data = make(tmp_path, [("a", "a", mask, [1, 1, 1])], crop=0.1)
    assert data.seen_box(1) == (4, 36, 5, 43)
    (rows,) = evaluate_cases(Thresholds(), data, **RUN)[1].rows.values()
    assert rows[0]["dice"] > 0.95
    assert (rows[1]["empty"], rows[1]["dice"]) == ("missed", 0)
    assert rows[1]["true_volume"] * 1000 == pytest.approx(18)


def test_entries_of_one_case_count_together_wherever_the_index_has_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    small, other, large = (
        case(rng, shape) for shape in ((2, 32, 32), (3, 32, 32), (2, 64, 64))
    )  # fmt: skip
    data = make(tmp_path, [
        ("b", "case_1", small, None), ("a", "case_10", other, None),
        ("b", "case_1_64x64", large, None),
    ])  # fmt: skip
    cases = evaluate_cases(Thresholds(), data, **RUN)[1]
    assert list(cases.rows) == ["b", "a"]
    assert cases.num_slices == {"b": 4, "a": 3}
    voxels = np.count_nonzero(small == 1) + np.count_nonzero(large == 1)
    assert cases.rows["b"][0]["true_volume"] == voxels
    assert not cases.in_mm


def test_slices_that_are_not_evaluated_count_as_empty(tmp_path: Path) -> None:
    mask = case(np.random.default_rng(2), (4, 32, 32))
    data = make(tmp_path, [("a", "a", mask, None)])
    data.places = data.places[1:3]
    (rows,) = evaluate_cases(Thresholds(), data, **RUN)[1].rows.values()
    assert rows[1]["true_volume"] == np.count_nonzero(mask[1:3] == 2)


def test_a_spacing_is_taken_where_the_store_has_none(tmp_path: Path, data: SliceDataset) -> None:
    assert known_spacings(data, None) == [(5, 1, 2)] * 3
    with pytest.raises(ValueError, match=r"--spacing.*\[5, 1, 2\]"):
        known_spacings(data, (1.0, 1.0, 1.0))
    mask = case(np.random.default_rng(2), (2, 32, 32))
    mixed = make(tmp_path / "mixed", [("a", "a", mask, None), ("b", "b", mask, [5, 1, 2])])
    with pytest.raises(ValueError, match="case a has no spacing.*--spacing"):
        known_spacings(mixed, None)
    alone = make(tmp_path / "alone", [("a", "a", mask, None)])
    assert known_spacings(alone, None) is None
    assert known_spacings(mixed, (3.0, 0.5, 0.5)) == [(3.0, 0.5, 0.5), (5, 1, 2)]
    cases = evaluate_cases(Thresholds(), mixed, **RUN | {"spacing": (3.0, 0.5, 0.5)})[1]
    assert cases.in_mm
    assert cases.rows["a"][0]["true_volume"] < cases.rows["b"][0]["true_volume"]


def test_the_worst_cases_are_shown_with_their_worst_slice(tmp_path: Path) -> None:
    class Half(Thresholds):
        def forward(self, image: Tensor, **prompts: Any) -> Tensor:
            logits = super().forward(image)
            logits[:, 1:, :, : self.hidden] = -1e6
            return logits

    rng = np.random.default_rng(0)
    number = NUM_WORST + 2
    data = make(tmp_path, [(f"c{n}", f"c{n}", case(rng, (2, 32, 32)), None) for n in range(number)])
    model = Half()
    model.hidden = 12
    cases = evaluate_cases(model, data, **RUN)[1]
    dice = {
        name: np.mean([row["dice"] for row in rows]) for name, rows in cases.rows.items()
    }  # fmt: skip
    wanted = sorted(dice, key=lambda name: (dice[name], name))[:NUM_WORST]
    assert [one["case"] for one in cases.worst] == wanted
    assert all(one["slice"].startswith(f"{one['case']}_slice") for one in cases.worst)


def test_pictures_show_the_labels_and_as_much_around() -> None:
    mask = np.zeros((200, 100), np.uint8)
    mask[100:180, 40:60] = 1
    assert shown_box([mask, mask * 0]) == (slice(60, 200), slice(18, 82))
    assert shown_box([mask * 0]) == (slice(0, 200), slice(0, 100))


def test_only_one_case_is_held(data: SliceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    collect = case_evaluation.CaseCollector.finish

    def finish(self: Any) -> None:
        held.append(len(self._parts))
        collect(self)

    monkeypatch.setattr(case_evaluation.CaseCollector, "finish", finish)
    evaluate_cases(Thresholds(), data, **RUN)
    assert max(held) == 1


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_whole_cases(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ["a", "a", "b", "c", "c", "c", "a", "d"]
    monkeypatch.setattr(samplers, "world_size", lambda: processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(samplers, "rank", lambda rank=rank: rank)
        shares.append(list(CaseShard(ids)))
    assert sorted(index for share in shares for index in share) == list(range(len(ids)))
    for share in shares:
        cases = [ids[index] for index in share]
        assert cases == sorted(cases, key=list(dict.fromkeys(cases)).index)  # no case comes twice
    owners = [{ids[index] for index in share} for share in shares]
    assert sum(map(len, owners)) == 4


def test_texts_of_one_process_come_back_as_they_are() -> None:
    assert gather_texts("Läsion ✓") == ["Läsion ✓"]
    assert gather_texts("") == [""]
