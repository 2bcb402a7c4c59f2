"""Marked masks: the same marks give what --predict gives, and undo goes back to the voxel."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset.scans.read import read_scan
from dataset.scans.slices import ScanSlices
from dataset.scans.volumes import read_volume
from tests.helpers.volume_layouts import SHAPE, SPACING, blob, stored_as
from usam.models.sam_med3d import build_sam_med3d
from usam.models.usam import build_usam
from usam.prediction.prompts import read_prompts, slice_prompts_of, volume_prompts_of
from usam.prediction.slice_prompts import slice_prompts
from usam.prediction.slices import Predictor, slice_logits, to_native
from usam.prediction.volume_prompts import marked
from usam.prediction.volumes import segment_objects
from usam.prediction.windows import EmbeddingCache
from usam.runtime.precision import Precision
from usam.serving.marks import box_mark, point_mark
from usam.serving.objects import MarkedMask
from usam.serving.slice_mask import SliceMask
from usam.serving.volume_mask import VolumeMask, restored

CPU = Precision(torch.device("cpu"), None)
CODES = ("LPS", "RAS", "PIR", "SLA")
DATA = {
    "classes": ["background", "first", "second"], "window": (-100.0, 200.0), "orientation": "LPS",
    "spacing": None, "img_size": 32,
}  # fmt: skip


@pytest.fixture(params=CODES)
def path(request, tmp_path: Path) -> Path:
    """A scan of two ellipsoids, stored in some axes."""
    image, _, affine = blob(SHAPE, SPACING)
    nib.save(stored_as(image, affine, request.param), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return build_sam_med3d("vit_tiny", "corrected").eval()


def as_array(one: MarkedMask) -> np.ndarray:
    mask = np.zeros(one.shape, dtype=bool)
    if one.region:
        mask[one.region.part] = one.region.mask
    return mask


def volume_mask(path: Path, model: torch.nn.Module) -> VolumeMask:
    scan = read_volume(path)
    return VolumeMask(EmbeddingCache(model, scan.image, CPU), scan, max_seconds=60)


def test_a_part_is_restored_as_the_whole_volume_is(path: Path) -> None:
    scan = read_volume(path)
    generator = np.random.default_rng(1)
    mask = np.zeros(scan.image.shape, dtype=bool)
    low = [size // 4 for size in mask.shape]
    mask[low[0] : low[0] + 7, low[1] : low[1] + 5, low[2] : low[2] + 4] = True
    mask &= generator.random(mask.shape) < 0.7
    region = restored(scan, mask)
    whole = scan.restore(mask.astype(np.uint8)) > 0
    found = np.zeros(whole.shape, dtype=bool)
    found[region.part] = region.mask
    assert whole.any()
    assert np.array_equal(found, whole)
    assert restored(scan, np.zeros_like(mask)) is None


def test_clicks_in_a_session_are_those_of_predict(path: Path, model, tmp_path: Path) -> None:
    one = volume_mask(path, model)
    i, j, k = (size // 2 for size in one.shape)
    one.add(point_mark((1, 1, 1), inside=False))
    assert one.region is None  # nothing says where the object is
    assert one.prompts() is None
    one.add(point_mark((i, j, k), inside=True))
    one.add(point_mark((i + 2, j - 3, k + 1), inside=True))
    one.add(box_mark((i - 4, j - 4, k - 2), (i + 4, j + 2, k + 3), inside=True))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"objects": [one.prompts()]}), encoding="utf-8")
    prompts = volume_prompts_of(
        Namespace(prompts=file, lps=False), read_prompts(file, [path]), path
    )
    scan = read_volume(path)
    objects = [marked(item, scan, mm=False) for item in prompts.objects]
    label, _ = segment_objects(EmbeddingCache(model, scan.image, CPU), objects)
    assert label.any()
    assert np.array_equal(as_array(one), scan.restore(label) > 0)


def test_undo_goes_back_to_the_same_voxels(tmp_path: Path, model) -> None:
    image, label, affine = blob(SHAPE, SPACING)
    nib.save(stored_as(image, affine, "LPS"), tmp_path / "scan.nii.gz")
    one = volume_mask(tmp_path / "scan.nii.gz", model)
    answers = [as_array(one)]
    start = np.zeros(one.shape, dtype=bool)
    start[5:20, 5:20, 5:15] = True
    for number, place in enumerate([(12, 12, 10), (20, 16, 12), (30, 20, 8)]):
        if number == 2:
            one.begin_with(start)
            answers.append(as_array(one))
            assert np.array_equal(answers[-1], start)
        one.add(point_mark(place, inside=number != 1))
        answers.append(as_array(one))
    again = as_array(one)
    for earlier in answers[-2::-1]:
        assert one.undo()
        assert np.array_equal(as_array(one), earlier)
    assert not one.undo()
    one.add(point_mark((12, 12, 10), inside=True))
    assert np.array_equal(as_array(one), answers[1])
    assert again.shape == one.shape
    with pytest.raises(ValueError, match="voxel 40 0 0 lies outside the scan, 0 0 0 to 39 33 25"):
        one.add(point_mark((40, 0, 0), inside=True))
    assert np.array_equal(as_array(one), answers[1])


def test_a_model_that_takes_boxes_gets_them_first(tmp_path: Path) -> None:
    image, _, affine = blob(SHAPE, SPACING)
    nib.save(stored_as(image, affine, "RAS"), tmp_path / "scan.nii.gz")
    torch.manual_seed(4)
    boxed = build_sam_med3d("vit_tiny", "corrected", 4).eval()
    one = volume_mask(tmp_path / "scan.nii.gz", boxed)
    one.add(point_mark((12, 12, 10), inside=True))
    before = as_array(one)
    one.add(box_mark((8, 8, 6), (18, 19, 14), inside=True))
    one.add(point_mark((20, 20, 10), inside=False))
    content = one.prompts()
    assert content == {"points": [[12, 12, 10, 1], [20, 20, 10, 0]], "box": [8, 8, 6, 18, 19, 14]}
    one.undo()
    one.undo()
    assert np.array_equal(as_array(one), before)


# ------------------------------------------------------------------ slices


def slice_mask(path: Path, mode: int | str) -> SliceMask:
    torch.manual_seed(5)
    model = build_usam("vit_tiny", 3, 32).eval()
    return SliceMask(ScanSlices(path, DATA), Predictor(model, CPU, DATA, prompt_mode=mode))


@pytest.mark.parametrize("mode", [1, 2, 3, "mixed"])
def test_a_marked_slice_is_that_of_predict(path: Path, mode, tmp_path: Path) -> None:
    one = slice_mask(path, mode)
    middle = [size // 2 for size in one.shape]
    low, high = list(middle), list(middle)
    for axis in range(3):
        if axis != one.axis:
            low[axis], high[axis] = low[axis] - 5, high[axis] + 5
    points, boxes = one.takes
    if points:
        one.add(point_mark(middle, inside=True))
    if boxes:
        one.add(box_mark(low, high, inside=True))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(one.prompts()), encoding="utf-8")
    prompts = slice_prompts_of(Namespace(prompts=file, lps=False), read_prompts(file, [path]), path)
    scan = ScanSlices(path, DATA)
    given = slice_prompts(prompts, mode, scan)
    (k,) = given.slices
    logits = slice_logits(one.predictor, torch.from_numpy(scan.model_input(k))[None], [k], given)
    label = np.zeros(scan.header.shape, dtype=np.uint8)
    scan.canonical(label)[k] = to_native(logits, scan.box, scan.shape[1:]).argmax(dim=1)[0]
    found = as_array(one)
    assert found.any() == (label > 0).any()
    if found.any():
        (number,) = np.unique(label[found])
        assert np.array_equal(found, label == number)


def test_marks_are_carried_to_neighbouring_slices_and_back(tmp_path: Path) -> None:
    image, _, affine = blob(SHAPE, SPACING)
    nib.save(stored_as(image, affine, "LPS"), tmp_path / "scan.nii.gz")
    one = slice_mask(tmp_path / "scan.nii.gz", "mixed")
    i, j, k = (size // 2 for size in one.shape)
    one.add(box_mark((i - 8, j - 8, k), (i + 8, j + 8, k), inside=True))
    before = as_array(one)
    assert before.any()
    number = one.carry(3)
    assert 1 <= number <= 6
    slices = np.flatnonzero(as_array(one).any(axis=(0, 1)))
    assert len(slices) > 1 and k in slices
    assert len(one.prompts()["boxes"]) == 1 + number
    one.undo()
    assert np.array_equal(as_array(one), before)
    assert len(one.prompts()["boxes"]) == 1


def test_a_model_refuses_prompts_it_was_not_trained_with(tmp_path: Path) -> None:
    image, _, affine = blob(SHAPE, SPACING)
    nib.save(stored_as(image, affine, "LPS"), tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match="takes no clicks, draw a box"):
        slice_mask(tmp_path / "scan.nii.gz", 1).add(point_mark((5, 5, 5), inside=True))
    with pytest.raises(ValueError, match="takes no boxes, click instead"):
        slice_mask(tmp_path / "scan.nii.gz", 2).add(box_mark((5, 5, 5), (9, 9, 5), inside=True))
    with pytest.raises(ValueError, match="lies on one slice"):
        slice_mask(tmp_path / "scan.nii.gz", 1).add(box_mark((5, 5, 5), (9, 9, 6), inside=True))
    assert read_scan(tmp_path / "scan.nii.gz").array.shape == (40, 34, 26)
