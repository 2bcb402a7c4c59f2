"""Surface scores: one definition for both systems, by hand and against MONAI."""

from __future__ import annotations

import monai.metrics
import numpy as np
import pytest
import torch

from usam.evaluation.case_metrics import score_class
from usam.evaluation.clicks import object_nsd


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
    assert object_nsd(found, truth, 1.5) == row["nsd_1"] == pytest.approx(wanted, abs=1e-5)


def test_an_object_that_was_not_found_has_nsd_zero() -> None:
    truth = ball(3)
    assert object_nsd(truth & False, truth, 1.5) == 0
