"""Surface scores: one definition for both systems, by hand and against MONAI."""

from __future__ import annotations

import monai.metrics
import numpy as np
import pytest
import torch
from scipy import ndimage

from usam.evaluation.case_metrics import Part, Row, score_case, score_class
from usam.evaluation.surfaces import object_nsd, surface_dice, surface_distances


def ball(radius: int, shift: int = 0) -> np.ndarray:
    grid = np.indices(3 * (2 * radius + 9,)) - radius - 4
    grid[0] -= shift
    return (grid**2).sum(axis=0) <= radius**2


def test_both_systems_have_one_nsd() -> None:
    """Two balls a voxel apart at 1.5 mm: the value that MONAI finds."""
    truth, found = ball(20), ball(20, shift=1)
    row = score_class([(found, truth, (1.5, 1.5, 1.5))], diagonal=99.0)
    pair = [torch.from_numpy(mask)[None, None] for mask in (found, truth)]
    wanted = float(monai.metrics.compute_surface_dice(
        *pair, [1.0], include_background=True, spacing=(1.5, 1.5, 1.5), use_subvoxels=True
    ))  # fmt: skip
    assert (
        object_nsd(found, truth, 3 * (1.5,), 1.0) == row["nsd_1"] == pytest.approx(wanted, abs=1e-5)
    )


def test_an_object_that_was_not_found_has_nsd_zero() -> None:
    truth = ball(3)
    assert object_nsd(truth & False, truth, 3 * (1.5,), 1.0) == 0


# ---------------------------------------------------------------------------- cases of one slice


def plane_pairs() -> list[tuple[np.ndarray, np.ndarray, tuple[float, float]]]:
    """50 pairs of masks (H, W) with the size of a pixel: lumps, shifted, hollow, single pixels."""
    rng = np.random.default_rng(5)
    pairs = []
    for number in range(50):
        shape = tuple(rng.integers(12, 48, 2))
        field = ndimage.gaussian_filter(rng.standard_normal(shape), 2.5)
        truth = field > np.quantile(field, rng.uniform(0.6, 0.97))
        found = np.roll(truth, rng.integers(-3, 4, 2), (0, 1)) ^ (rng.random(shape) < 0.01)
        if number % 5 == 0:  # a ring against a single pixel far away
            truth = truth & ~ndimage.binary_erosion(truth)
            found = np.zeros(shape, bool)
            found[tuple(rng.integers(0, shape))] = True
        pairs.append((found, truth, ((0.7, 0.7), (1.0, 1.0), (0.5, 1.3))[number % 3]))
    return pairs


def one_slice(found: np.ndarray, truth: np.ndarray, spacing: tuple[float, float]) -> Row:
    part = Part(found[None].astype(np.uint8), truth[None].astype(np.uint8), (5.0, *spacing))
    (row,) = score_case([part], 2, in_mm=True)
    return row


def weighted_95(distances: np.ndarray, lengths: np.ndarray) -> float:
    """The smallest distance that 95 % of the contour does not exceed."""
    order = distances.argsort()
    share = lengths[order].cumsum() / lengths.sum()
    return float(distances[order][min(np.searchsorted(share, 0.95), len(order) - 1)])


def contour(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Corners of pixels (n, 2) in mm that the contour passes, and its length at each."""
    padded = np.pad(mask, 1)
    high, wide = spacing
    places, lengths = [], []
    for y, x in np.ndindex(padded.shape[0] - 1, padded.shape[1] - 1):
        block = padded[y : y + 2, x : x + 2]
        if block.sum() in (0, 4):
            continue
        across = np.hypot(high, wide) / 2  # from the middle of a side to that of the next
        if block.sum() in (1, 3):
            length = across
        elif block[0, 0] == block[1, 1]:
            length = 2 * across
        else:
            length = wide if block[0, 0] == block[0, 1] else high
        places.append((y * high, x * wide))
        lengths.append(length)
    return np.array(places), np.array(lengths)


def test_a_slice_scores_as_monai_does_in_2d() -> None:
    for found, truth, spacing in plane_pairs():
        row = one_slice(found, truth, spacing)
        tensors = [torch.from_numpy(mask)[None, None] for mask in (found, truth)]
        how = {"include_background": True, "spacing": spacing, "use_subvoxels": True}
        for name, tolerance in (("nsd_1", 1.0), ("nsd_2", 2.0)):
            wanted = float(monai.metrics.compute_surface_dice(*tensors, [tolerance], **how))
            assert row[name] == pytest.approx(wanted, abs=1e-5)
        padded = [torch.from_numpy(np.pad(mask, 1)) for mask in (found, truth)]
        edges_and_lengths = monai.metrics.get_mask_edges(*padded, crop=False, spacing=spacing)
        *edges, first, second = [np.asarray(values) for values in edges_and_lengths]
        values = [
            weighted_95(monai.metrics.get_surface_distance(a, b, spacing=spacing), lengths[a])
            for a, b, lengths in ((*edges, first), (*edges[::-1], second))
        ]
        assert row["hd95"] == pytest.approx(max(values), abs=1e-5)


def test_a_slice_scores_as_brute_force_says() -> None:
    for found, truth, spacing in plane_pairs():
        row = one_slice(found, truth, spacing)
        (places, lengths), (others, other_lengths) = (
            contour(mask, spacing) for mask in (found, truth)
        )
        apart = np.linalg.norm(places[:, None] - others[None], axis=-1)
        near = apart.min(axis=1), apart.min(axis=0)
        wanted = max(weighted_95(near[0], lengths), weighted_95(near[1], other_lengths))
        assert row["hd95"] == pytest.approx(wanted, abs=1e-5)
        for name, tolerance in (("nsd_1", 1.0), ("nsd_2", 2.0)):
            within = lengths[near[0] <= tolerance + 1e-9].sum()
            within += other_lengths[near[1] <= tolerance + 1e-9].sum()
            share = within / (lengths.sum() + other_lengths.sum())
            assert row[name] == pytest.approx(share, abs=1e-5)


def test_a_shifted_square_by_hand() -> None:
    """A square of 4 has a contour of 12 + 4 / sqrt(2); half of it lies on the shifted one's."""
    truth = np.zeros((12, 12), bool)
    truth[4:8, 4:8] = True
    found = np.roll(truth, 1, 1)
    row = one_slice(found, truth, (1.0, 1.0))
    assert (row["hd95"], row["nsd_1"]) == (1, 1)
    surfaces = surface_distances([(found[None], truth[None], (5, 1, 1))], flat=True)
    assert surfaces["surfel_areas_gt"].sum() == pytest.approx(12 + 4 * 0.5**0.5)
    assert surface_dice(surfaces, 0.5) == pytest.approx(0.5)
    assert one_slice(found, truth, (1.5, 1.5))["nsd_1"] == pytest.approx(0.5)


def test_a_stray_island_in_a_slice_counts_by_its_contour() -> None:
    """As a volume of one slice its top and bottom, which match, would outweigh the contours."""
    rows, columns = np.mgrid[:120, :160]
    truth = (rows - 60) ** 2 + (columns - 45) ** 2 <= 40**2
    found = truth.copy()
    found[57:63, 145:151] = True  # 60 pixels from the disc
    row = one_slice(found, truth, (1.0, 1.0))
    assert 55 < row["hd95"] <= 66
    lengths = [contour(mask, (1.0, 1.0))[1].sum() for mask in (found, truth)]
    assert row["nsd_1"] == pytest.approx(2 * lengths[1] / sum(lengths), abs=1e-5)


def test_one_labelled_slice_of_several_is_still_a_volume() -> None:
    truth = np.zeros((3, 12, 12), np.uint8)
    truth[1, 4:8, 4:8] = 1
    found = np.roll(truth, 1, 2)
    (row,) = score_case([Part(found, truth, (5.0, 1.0, 1.0))], 2, in_mm=True)
    whole = score_class([(found == 1, truth == 1, (5.0, 1.0, 1.0))], diagonal=99.0)
    assert row["nsd_1"] == whole["nsd_1"]


def test_a_clicked_volume_of_one_slice_is_flat() -> None:
    truth = np.zeros((12, 12, 1), bool)
    truth[4:8, 4:8] = True
    found = np.roll(truth, 1, 1)
    assert object_nsd(found, truth, 3 * (1.5,), 1.0) == pytest.approx(0.5)
    assert object_nsd(found, truth, 3 * (1.0,), 1.0) == 1
