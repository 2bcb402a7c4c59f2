"""SAM's own weights on scans: prompts to slices, objects followed, results in the scan's axes."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import usam
from dataset.scans.slices import ScanSlices
from tests.helpers.command import run
from usam.models.sam import Sam, build_sam
from usam.prediction.pretrained import SliceSegmenter, object_logits, open_scan, segment_objects
from usam.prediction.prompts import ObjectPrompts
from usam.prediction.slice_objects import SliceObject, on_slices
from usam.runtime.precision import select_precision
from usam.weights.pretrained import load_pretrained

SHAPE = (40, 48, 9)
FLOAT32 = select_precision("off", torch.device("cpu"))


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(0)
    return build_sam("vit_tiny", 64)


def scan_file(path: Path, affine: np.ndarray | None = None, flip: bool = False) -> Path:
    """A CT of soft tissue in air, RAS or with its first two axes flipped (LPS)."""
    values = np.random.default_rng(0).normal(40, 30, SHAPE).astype(np.int16)
    values[:4] = -1000
    if flip:
        values = values[::-1, ::-1]
    affine = np.diag([-1.0, -1.0, 2.0, 1.0] if flip else [1.0, 1.0, 2.0, 1.0])
    nib.save(nib.Nifti1Image(np.ascontiguousarray(values), affine), path)
    return path


def opened(path: Path, window: list[str] | None = None) -> ScanSlices:
    return open_scan(path, Namespace(window=window, channel=None, series=None))


def test_ct_has_the_abdominal_window_and_other_scans_percentiles(tmp_path: Path) -> None:
    path = scan_file(tmp_path / "ct.nii.gz")
    assert opened(path).window == (-160.0, 240.0)
    assert opened(path, ["0", "80"]).window == (0.0, 80.0)
    mr = nib.Nifti1Image(np.arange(4000, dtype=np.int16).reshape(20, 20, 10), np.eye(4))
    nib.save(mr, tmp_path / "mr.nii.gz")
    assert opened(tmp_path / "mr.nii.gz").window == "percentile"


@pytest.mark.parametrize("boxes", [(3,), (2, 8), (0, 5, 6)])
def test_every_slice_between_boxes_is_reached_once(boxes: tuple[int, ...]) -> None:
    span = (min(boxes), max(boxes)) if len(boxes) > 1 else None
    one = SliceObject("a", 1, dict.fromkeys(boxes, (0.0, 0.0, 9.0, 9.0)), span=span)
    reached = [k for seed, chains in one.chains() for k in (seed, *(n for c in chains for n in c))]
    assert sorted(reached) == one.slices == list(range(min(boxes), max(boxes) + 1))[: len(reached)]


def test_a_volume_box_starts_in_the_middle_and_reaches_both_ends(tmp_path: Path) -> None:
    scan = opened(scan_file(tmp_path / "ct.nii.gz"))
    one = on_slices(ObjectPrompts(box=(5, 6, 1, 30, 40, 7)), scan, mm=False)
    assert one.span == (1, 7)
    ((seed, chains),) = one.chains()
    assert seed == 4
    assert [list(chain) for chain in chains] == [[3, 2, 1], [5, 6, 7]]
    assert one.limit == (9.0, 7.0, 34.0, 41.0)  # RAS x 5..30 of 40 are columns 39 - 30..39 - 5
    in_mm = on_slices(ObjectPrompts(box=(5, 6, 2, 30, 40, 14)), scan, mm=True)
    assert in_mm == one


def test_labels_stay_within_the_span_and_the_box(tmp_path: Path, sam: Sam) -> None:
    scan = opened(scan_file(tmp_path / "ct.nii.gz"))
    one = on_slices(ObjectPrompts("liver", 3, box=(5, 6, 1, 30, 40, 7)), scan, mm=False)
    segmenter = SliceSegmenter(sam, scan, FLOAT32)
    label, empty = segment_objects(segmenter, [one])
    found = np.argwhere(label == 3)
    assert empty == []
    assert set(np.unique(label)) == {0, 3}
    assert (found.min(axis=0) >= (5, 6, 1)).all()
    assert (found.max(axis=0) <= (30, 40, 7)).all()
    assert segmenter.num_encoded <= 7


def test_the_same_place_in_a_flipped_file_gives_the_same_label(tmp_path: Path, sam: Sam) -> None:
    labels = []
    for flip in (False, True):
        scan = opened(scan_file(tmp_path / f"{flip}.nii.gz", flip=flip))
        box, point = (3, 8.0, 6.0, 30.0, 40.0), (12.0, 10.0, 5.0, 1)
        if flip:
            box, point = (3, 31.0, 41.0, 9.0, 7.0), (27.0, 37.0, 5.0, 1)
        one = on_slices(ObjectPrompts(boxes=(box,), points=(point,)), scan, mm=False)
        assert one.slices == [3, 5]
        label, _ = segment_objects(SliceSegmenter(sam, scan, FLOAT32), [one])
        labels.append(label[::-1, ::-1] if flip else label)
    assert labels[0].any()
    np.testing.assert_array_equal(*labels)


def test_a_single_point_takes_the_mask_of_the_best_quality(tmp_path: Path, sam: Sam) -> None:
    scan = opened(scan_file(tmp_path / "ct.nii.gz"))
    segmenter = SliceSegmenter(sam, scan, FLOAT32)
    embedding = segmenter._embedding(4)
    point = torch.tensor([[20.0, 30.0]]), torch.tensor([1])
    sparse, dense = sam.prompt_encoder((point[0][None], point[1][None]), None, None)
    with torch.inference_mode():
        masks, quality = sam.mask_decoder(
            image_embeddings=embedding, image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True,
        )  # fmt: skip
        logits, best = sam.segment(embedding, points=point)
    assert masks.shape[1] == 3
    assert best == quality.max()
    side = torch.nn.functional.interpolate(
        masks[:, quality[0].argmax()][:, None], (64, 64), mode="bilinear"
    )
    torch.testing.assert_close(logits, side[0, 0])


BAD = {
    "is outside 40 x 48 x 9 voxels": {"boxes": ((3, 5.0, 5.0, 60.0, 30.0),)},
    "has no area": {"boxes": ((3, 5.0, 5.0, 5.0, 30.0),)},
    "has no prompt": {},
    "only points outside it": {"points": ((5.0, 5.0, 5.0, 0),)},
    "two boxes on slice 3": {"boxes": ((3, 1.0, 1.0, 9.0, 9.0), (3, 2.0, 2.0, 9.0, 9.0))},
    "give one kind": {"boxes": ((3, 1.0, 1.0, 9.0, 9.0),), "box": (1, 1, 1, 9, 9, 8)},
    "give each --box a --slice": {"boxes": ((None, 1.0, 1.0, 9.0, 9.0),)},
}


@pytest.mark.parametrize("problem", BAD)
def test_prompts_that_cannot_be_meant_are_refused(tmp_path: Path, problem: str) -> None:
    scan = opened(scan_file(tmp_path / "ct.nii.gz"))
    with pytest.raises(ValueError, match=problem):
        on_slices(ObjectPrompts(**BAD[problem]), scan, mm=False)


def test_a_volume_box_needs_several_slices(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 1), np.int16), np.eye(4)), tmp_path / "one.nii.gz")
    with pytest.raises(ValueError, match="3D box on a scan of one slice"):
        on_slices(ObjectPrompts(box=(1, 1, 0, 5, 5, 0)), opened(tmp_path / "one.nii.gz"), mm=False)


def test_an_object_that_vanishes_keeps_its_last_box(tmp_path: Path, sam: Sam) -> None:
    scan = opened(scan_file(tmp_path / "ct.nii.gz"))
    one = on_slices(ObjectPrompts(box=(5, 6, 1, 30, 40, 7)), scan, mm=False)
    numbers = [k for k, _ in object_logits(SliceSegmenter(sam, scan, FLOAT32), one)]
    assert sorted(numbers) == list(range(1, 8))


def test_files_bring_their_own_size_and_scale(tmp_path: Path, sam: Sam) -> None:
    for name, scale in (("sam_tiny.pth", "sam"), ("medsam_tiny.pth", "minmax")):
        torch.save(sam.state_dict(), tmp_path / name)
        model, facts = load_pretrained("vit_tiny", str(tmp_path / name))
        assert (model.img_size, model.preparation.name) == (64, scale)
        assert facts["weights"] == "SAM vit_tiny weights"
    assert load_pretrained("vit_tiny", str(tmp_path / name), "sam")[0].preparation.name == "sam"
    with pytest.raises(ValueError, match="needs trained weights"):
        load_pretrained("vit_tiny", "none")


def test_named_objects_are_segmented_from_the_command_line(
    tmp_path: Path, sam: Sam, capsys: pytest.CaptureFixture
) -> None:
    path, weights = scan_file(tmp_path / "ct.nii.gz"), tmp_path / "sam.pth"
    torch.save(sam.state_dict(), weights)
    objects = [
        {"name": "liver", "label": 5, "box": [5, 6, 2, 30, 40, 4]},
        {"name": "spleen", "boxes": [{"slice": 6, "box": [8, 8, 30, 30]}]},
    ]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"objects": objects}), encoding="utf-8")
    words = ["--predict", path, "--sam_model", "vit_tiny", "--sam_weight", weights,
             "--prompts", prompts, "--output_dir", tmp_path / "out", "--device", "cpu"]  # fmt: skip
    result = run(capsys, *words)
    assert result.code == 0, result.err
    assert "liver" in result.out
    assert "window -160 to 240" in result.out
    facts = json.loads((tmp_path / "out" / "ct_seg.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in facts["objects"]] == [5, 2]
    label = nib.load(tmp_path / "out" / "ct_seg.nii.gz")
    assert np.array_equal(label.affine, nib.load(path).affine)
    assert not np.asarray(label.dataobj)[..., [0, 1, 5, 7, 8]].any()
    model = usam.load(sam_model="vit_tiny", sam_weight=weights, device="cpu")
    for given in (prompts, {"objects": objects}):  # from Python: a file, and its content
        np.testing.assert_array_equal(model.predict(path, prompts=given).label_map, label.dataobj)
    with pytest.raises(ValueError, match="a session needs a checkpoint"):
        model.session(path)
