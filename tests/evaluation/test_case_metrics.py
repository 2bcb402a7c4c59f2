"""Figures of a case: by hand, against surface-distance and MONAI, and over many cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import monai.metrics
import numpy as np
import pytest
import surface_distance
import torch
from scipy import ndimage

from usam.evaluation.case_metrics import (
    MEAN,
    METRICS,
    Part,
    describe,
    mean_row,
    score_case,
    score_class,
    summarize,
)
from usam.evaluation.surfaces import surface_distances

SPACINGS = [(3.0, 0.977, 0.977), (5.0, 0.7, 0.7), (2.5, 0.8, 0.8), (0.5, 2.0, 1.3), (1.0, 1.0, 1.0)]


class Pair(NamedTuple):
    """Two masks of one size and their spacing."""

    name: str
    prediction: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, float, float]


def blob(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """Smooth lumps that fill `share` of a volume and may leave it at its border."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), (1, 2.5, 2.5))
    return field > np.quantile(field, 1 - share)


def random_pairs() -> Iterator[Pair]:
    rng = np.random.default_rng(7)
    for number in range(40):
        shape = tuple(rng.integers((1, 12, 12), (14, 40, 40)).tolist())
        share = rng.uniform(0.01, 0.4)
        truth = blob(rng, shape, share)
        if number % 4 == 0:  # nothing in common but by chance
            prediction = blob(rng, shape, rng.uniform(0.01, 0.4))
        else:
            prediction = np.roll(truth, rng.integers(-3, 4, 3), (0, 1, 2)) ^ blob(rng, shape, 0.02)
        yield Pair(f"random {number}", prediction, truth, SPACINGS[number % len(SPACINGS)])


def degenerate_pairs() -> Iterator[Pair]:
    def volume(*places: tuple) -> np.ndarray:
        mask = np.zeros((7, 9, 11), bool)
        for place in places:
            mask[place] = True
        return mask

    everything, corner, far = np.s_[:, :, :], (0, 0, 0), (6, 8, 10)
    masks = {
        "one voxel": volume((3, 4, 5)),
        "a corner": volume(corner),
        "the far corner": volume(far),
        "two corners": volume(corner, far),
        "all": volume(everything),
        "a slice": volume(np.s_[2]),
        "a column": volume(np.s_[:, 4, 5]),
        "a hollow box": volume(np.s_[1:6, 1:8, 1:9]) & ~volume(np.s_[2:5, 2:7, 2:8]),
        "a chessboard": np.indices((7, 9, 11)).sum(axis=0) % 2 == 0,
    }
    names = list(masks)
    chosen = [(a, b) for i, a in enumerate(names) for b in names[i:]]
    for number, (a, b) in enumerate(chosen):
        yield Pair(f"{a}, {b}", masks[a], masks[b], SPACINGS[number % len(SPACINGS)])
    flat = np.zeros((1, 8, 8), bool)
    flat[0, 2:5, 2:5] = True
    yield Pair("a single slice", np.roll(flat, 2, 2), flat, SPACINGS[0])


PAIRS = [*random_pairs(), *degenerate_pairs()]
assert len(PAIRS) >= 50


def scored(pair: Pair) -> dict:
    return score_class([(pair.prediction, pair.truth, pair.spacing)], diagonal=np.inf)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [scored(pair) for pair in PAIRS]


# ------------------------------------------------------------------------ other implementations


def test_cases_score_as_deepminds_surface_distance_says(rows: list[dict]) -> None:
    """The same definition: elements between voxels, weighted with their area."""
    for pair, row in zip(PAIRS, rows, strict=True):
        found = surface_distance.compute_surface_distances(
            pair.truth, pair.prediction, pair.spacing
        )
        wanted = {
            "hd95": surface_distance.compute_robust_hausdorff(found, 95),
            "nsd_1": surface_distance.compute_surface_dice_at_tolerance(found, 1),
            "nsd_2": surface_distance.compute_surface_dice_at_tolerance(found, 2),
            "dice": surface_distance.compute_dice_coefficient(pair.truth, pair.prediction),
        }
        got = {name: row[name] for name in wanted}
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5), pair.name


def test_cases_score_as_monai_says(rows: list[dict]) -> None:
    """Dice and IoU, and NSD where MONAI weighs elements by area."""
    for pair, row in zip(PAIRS, rows, strict=True):
        both = [torch.from_numpy(mask)[None, None] for mask in pair[1:3]]
        how = {"include_background": True, "spacing": pair.spacing, "use_subvoxels": True}
        wanted = {
            "dice": monai.metrics.compute_dice(*both),
            "iou": monai.metrics.compute_iou(*both),
            "nsd_1": monai.metrics.compute_surface_dice(*both, class_thresholds=[1.0], **how),
            "nsd_2": monai.metrics.compute_surface_dice(*both, class_thresholds=[2.0], **how),
        }
        got = {name: row[name] for name in wanted}
        wanted = {name: float(value) for name, value in wanted.items()}
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5), pair.name


def test_hd95_differs_from_monais_by_a_voxel_at_most(rows: list[dict]) -> None:
    """MONAI takes the voxels of the border, each as one, and interpolates between two distances.

    Ours lie half a voxel outside and count by area. Both are within the largest distance.
    """
    differences = []
    for pair, row in zip(PAIRS, rows, strict=True):
        both = [torch.from_numpy(mask)[None, None] for mask in pair[1:3]]
        how = {"include_background": True, "spacing": pair.spacing}
        theirs = float(monai.metrics.compute_hausdorff_distance(*both, percentile=95, **how))
        largest = float(monai.metrics.compute_hausdorff_distance(*both, **how))
        voxel = float(np.linalg.norm(pair.spacing))
        assert row["hd95"] <= largest + voxel, pair.name
        if pair.name.startswith("random"):
            differences.append(abs(row["hd95"] - theirs) / voxel)
    assert np.median(differences) < 0.3
    assert np.quantile(differences, 0.9) < 1


def test_surfaces_of_other_libraries_lack_a_value_where_one_mask_is_empty() -> None:
    """Why the rules for empty masks are our own: inf and nan there, penalties here."""
    mask = torch.zeros(1, 1, 4, 5, 6)
    mask[..., 2, 2, 2] = 1
    with pytest.warns(UserWarning, match="all 0"):
        found = monai.metrics.compute_hausdorff_distance(mask * 0, mask, percentile=95)
    assert not torch.isfinite(found).any()
    truth = mask[0, 0].numpy() > 0
    row = score_class([(truth & False, truth, (1, 1, 1))], diagonal=7.0)
    assert row["hd95"] == 7.0


# -------------------------------------------------------------------------------------- by hand


def test_a_shifted_cube_by_hand() -> None:
    truth = np.zeros((6, 20, 20), bool)
    truth[1:3, 4:8, 4:8] = True  # 2 x 4 x 4 voxels of 5 x 1 x 1 mm
    prediction = np.roll(truth, 1, 2)
    row = score_class([(prediction, truth, (5.0, 1.0, 1.0))], diagonal=99.0)
    assert row["dice"] == 2 * 24 / 64
    assert row["iou"] == 24 / 40
    assert row["hd95"] == 1
    assert row["nsd_1"] == row["nsd_2"] == 1
    assert row["volume_difference"] == row["volume_difference_percent"] == 0
    assert row["true_volume"] == pytest.approx(32 * 5 / 1000)
    assert (row["lesions"], row["lesions_found"], row["false_lesions"]) == (1, 1, 0)
    assert row["detection_rate"] == 1
    assert row["empty"] == ""


def test_lesions_connect_over_corners_and_are_found_by_a_single_voxel() -> None:
    truth = np.zeros((5, 10, 10), bool)
    truth[0, 0, 0] = truth[1, 1, 1] = True  # one lesion, over a corner
    truth[4, 8, 8] = True
    truth[2, 5:7, 5:7] = True
    prediction = np.zeros_like(truth)
    prediction[1, 1, 1] = prediction[2, 6, 6] = True
    prediction[0, 9, 0] = True  # nothing there
    row = score_class([(prediction, truth, (1, 1, 1))], diagonal=9.0)
    assert (row["lesions"], row["lesions_found"], row["false_lesions"]) == (3, 2, 1)
    assert row["detection_rate"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("empty", ["absent", "missed", "false alarm"])
def test_empty_masks_follow_the_stated_rules(empty: str) -> None:
    some, none = np.ones((2, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8)
    prediction, truth = {
        "absent": (none, none), "missed": (none, some), "false alarm": (some, none)
    }[empty]  # fmt: skip
    (row,) = score_case([Part(prediction, truth, (2.0, 1.0, 1.0))], 2, in_mm=True)
    assert row["empty"] == empty
    if empty == "absent":
        assert [row[metric] for metric in METRICS] == [None] * len(METRICS)
        return
    assert [row[metric] for metric in ("dice", "iou", "nsd_1", "nsd_2")] == [0, 0, 0, 0]
    assert row["hd95"] == pytest.approx((2**2 + 2**2 + 3**2) ** 0.5)  # corner to corner
    sign = -1 if empty == "missed" else 1
    assert row["volume_difference"] == pytest.approx(sign * 24 * 2 / 1000)
    known = empty == "missed"
    assert row["volume_difference_percent"] == (-100 if known else None)
    assert row["detection_rate"] == (0 if known else None)
    assert row["false_lesions"] == (0 if known else 1)


def test_labels_are_told_apart_and_without_mm_voxels_count() -> None:
    truth = np.zeros((3, 8, 8), np.uint8)
    truth[:, :3, :3], truth[:, 5:, 5:] = 1, 2
    prediction = truth.copy()
    prediction[:, 5:, 5:6] = 1
    rows = score_case([Part(prediction, truth, (1, 1, 1))], 4, in_mm=False)
    assert [row["dice"] for row in rows] == [2 * 27 / (27 + 36), 2 * 18 / (27 + 18), None]
    assert [row["volume_difference"] for row in rows] == [9, -9, None]


def test_volumes_of_other_size_count_together() -> None:
    """One lesion of two, missed in the part that shows it alone: its surface is found nowhere."""
    first, second = np.zeros((3, 8, 8), bool), np.zeros((2, 16, 16), bool)
    first[1, 2:4, 2:4] = second[0, 4:12, 4:12] = True
    masks = [(first, first, (1, 1, 1)), (second & False, second, (1, 1, 1))]
    row = score_class(masks, diagonal=21.0)
    assert row["dice"] == 2 * 4 / (4 + 68)
    assert (row["lesions"], row["lesions_found"]) == (2, 1)
    assert row["hd95"] == 21
    small, large = surface_distances(masks[:1]), surface_distances(masks[1:])
    surface, missed = small["surfel_areas_gt"].sum(), large["surfel_areas_gt"].sum()
    assert row["nsd_1"] == pytest.approx(2 * surface / (2 * surface + missed))


def test_a_case_in_threads_scores_the_same() -> None:
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(0)
    parts = [Part(*rng.integers(0, 5, (2, 6, 24, 24)).astype(np.uint8), (3, 1, 1))]
    with ThreadPoolExecutor(4) as pool:
        assert score_case(parts, 5, in_mm=True, run=pool.map) == score_case(parts, 5, in_mm=True)


# ---------------------------------------------------------------------------------- many cases


def test_a_set_of_cases_is_described_by_hand() -> None:
    found = describe([1.0, 2.0, 3.0, 6.0], seed=1)
    assert (found["n"], found["mean"], found["median"]) == (4, 3.0, 2.5)
    assert found["std"] == pytest.approx((14 / 3) ** 0.5)
    assert 1 <= found["low"] < 3 < found["high"] <= 6
    assert describe([1.0, 2.0, 3.0, 6.0], seed=1) == found
    assert describe([], seed=1) == {
        "n": 0, "mean": None, "std": None, "median": None, "low": None, "high": None
    }  # fmt: skip
    assert describe([0.5], seed=1)["std"] is None


def test_the_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for seed in range(100):
        found = describe(rng.normal(0.7, 0.1, 40), seed=seed)
        inside += found["low"] <= 0.7 <= found["high"]
    assert 88 <= inside <= 100


def test_means_leave_out_what_is_undefined() -> None:
    absent = dict.fromkeys(METRICS) | {"lesions": 0, "lesions_found": 0, "false_lesions": 0}
    one = dict.fromkeys(METRICS, 0.5) | {"lesions": 2, "lesions_found": 1, "false_lesions": 3}
    two = dict.fromkeys(METRICS, 0.9) | {"lesions": 1, "lesions_found": 1, "false_lesions": 0}
    assert mean_row([absent, one])["dice"] == 0.5
    summary = summarize({"a": [one, two], "b": [absent, two]}, ["rest", "organ", "tumour"], seed=0)
    assert list(summary) == ["organ", "tumour", MEAN]
    assert (summary["organ"]["dice"]["n"], summary["tumour"]["dice"]["n"]) == (1, 2)
    assert summary[MEAN]["dice"]["mean"] == pytest.approx((0.7 + 0.9) / 2)
    assert summary[MEAN]["lesions"] == {"lesions": 4, "lesions_found": 3, "false_lesions": 3}
