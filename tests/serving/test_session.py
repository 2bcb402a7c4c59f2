"""Several objects of a scan: kept apart, locked, saved as --predict saves, and read again."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset.scans.read import read_scan
from dataset.scans.volumes import volume_of
from tests.helpers.volume_layouts import SHAPE, SPACING, blob, stored_as
from usam.models.sam_med3d import build_sam_med3d
from usam.prediction.windows import EmbeddingCache
from usam.runtime.precision import Precision
from usam.serving.marks import point_mark
from usam.serving.session import ScanSession
from usam.serving.volume_mask import VolumeMask


@pytest.fixture
def session(tmp_path: Path) -> ScanSession:
    image, _, affine = blob(SHAPE, SPACING)
    nib.save(stored_as(image, affine, "PIR"), tmp_path / "scan.nii.gz")
    return opened(tmp_path / "scan.nii.gz")


def opened(path: Path) -> ScanSession:
    torch.manual_seed(3)
    model = build_sam_med3d("vit_tiny", "corrected").eval()
    scan = read_scan(path)
    volume = volume_of(scan)
    cache = EmbeddingCache(model, volume.image, Precision(torch.device("cpu"), None))
    return ScanSession(scan, lambda: VolumeMask(cache, volume, 60))


def cube(session: ScanSession, low: int, high: int) -> np.ndarray:
    mask = np.zeros(session.labels.shape, dtype=bool)
    mask[low:high, low:high, low:high] = True
    return mask


def test_objects_do_not_overwrite_locked_ones_and_undo_gives_voxels_back(session) -> None:
    session.change(1, lambda mask: mask.begin_with(cube(session, 2, 10)))
    _, part = session.change(2, lambda mask: mask.begin_with(cube(session, 6, 14)))
    assert part == (slice(6, 14),) * 3
    assert np.count_nonzero(session.labels == 1) == 8**3 - 4**3
    assert np.count_nonzero(session.labels == 2) == 8**3
    undone, _ = session.change(2, lambda mask: mask.undo())
    assert undone
    assert np.array_equal(session.labels == 1, cube(session, 2, 10))
    session.lock(1, locked=True)
    session.change(2, lambda mask: mask.begin_with(cube(session, 6, 14)))
    assert np.count_nonzero(session.labels == 1) == 8**3
    assert np.count_nonzero(session.labels == 2) == 8**3 - 4**3
    with pytest.raises(ValueError, match="locked"):
        session.change(1, lambda mask: mask.undo())
    with pytest.raises(ValueError, match="locked"):
        session.remove(1)
    session.lock(1, locked=False)
    session.remove(1)
    assert np.array_equal(session.labels == 2, cube(session, 6, 14))
    assert not (session.labels == 1).any()
    with pytest.raises(ValueError, match="label 0"):
        session.object(0)


def test_a_session_is_saved_placed_as_the_scan_and_read_again(session, tmp_path: Path) -> None:
    place = [size // 2 for size in session.labels.shape]
    session.change(3, lambda mask: mask.add(point_mark(place, inside=True)))
    session.change(3, lambda mask: mask.add(point_mark([p + 2 for p in place], inside=False)))
    session.change(1, lambda mask: mask.begin_with(cube(session, 2, 6)))
    session.lock(1, locked=True)
    session.save_marks(tmp_path / "marks.json")
    session.save_labels(tmp_path / "labels.nii.gz")
    saved, scan = nib.load(tmp_path / "labels.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj), session.labels)
    assert np.array_equal(saved.affine, scan.affine)
    prompts = session.prompts({1: "cube", 3: "liver"})
    voxels = [[*place, 1], [*(p + 2 for p in place), 0]]
    assert prompts["objects"] == [{"name": "liver", "label": 3, "points": voxels, "centre": place}]
    again = opened(tmp_path / "scan.nii.gz")
    again.load(tmp_path / "marks.json")
    assert np.array_equal(again.labels, session.labels)
    with pytest.raises(ValueError, match="locked"):
        again.change(1, lambda mask: mask.undo())
    again.change(3, lambda mask: mask.undo())
    session.change(3, lambda mask: mask.undo())
    assert np.array_equal(again.labels, session.labels)
    more = point_mark([p - 2 for p in place], inside=True)
    for one in (again, session):
        one.change(3, lambda mask: mask.add(more))
    assert np.array_equal(again.labels, session.labels)
    (tmp_path / "marks.json").write_text('{"annotation": 1, "shape": [1, 2, 3]}')
    with pytest.raises(ValueError, match="it belongs to another scan or version"):
        opened(tmp_path / "scan.nii.gz").load(tmp_path / "marks.json")
