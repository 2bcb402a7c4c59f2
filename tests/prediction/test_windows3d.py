"""Clicks on whole volumes: an oracle that sees the bright object in its window stands in for a net.

What is tested is geometry: which windows are opened, their clicks and how they are joined.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from dataset.scans.header import ScanHeader
from dataset.scans.volumes import Grid, ScanVolume
from usam.evaluation.click_report import Item, format_clicks, write_report
from usam.evaluation.clicks import evaluate_objects, simulated_clicks
from usam.models.sam_med3d import build_sam_med3d
from usam.prediction.prompts import (
    ObjectPrompts,
    VolumePrompts,
    read_prompts,
    volume_prompts,
    volume_prompts_of,
)
from usam.prediction.volume_prompts import MarkedObject, marked
from usam.prediction.volumes import segment_objects
from usam.prediction.windows import EmbeddingCache, Session, deepest_of_pieces, window_weight
from usam.runtime.precision import Precision

CPU = Precision(torch.device("cpu"), None)
SIDE = 32


class Oracle:
    """Finds the bright pieces of its window that hold a positive click or meet the given mask.

    A negative click takes its piece away. Its logits are of full size from the start.
    """

    side = SIDE

    def __init__(self, num_point_embeddings: int = 2) -> None:
        self.config = {"num_point_embeddings": num_point_embeddings}
        self.encoded, self.boxes = 0, []

    def image_encoder(self, crop: Tensor) -> Tensor:
        self.encoded += 1
        return crop

    def decode(self, embedding: Tensor, points, mask: Tensor, *, boxes=None) -> Tensor:
        self.boxes.append(boxes)
        pieces, _ = ndimage.label(embedding[0, 0].numpy() > -0.5)  # of crops, normalised
        chosen = set(np.unique(pieces[self.upscale(mask)[0, 0].numpy() > 0]))
        if points is not None:
            for voxel, sign in zip(*(part[0].tolist() for part in points), strict=True):
                piece = pieces[tuple(map(int, voxel))]
                (chosen.add if sign else chosen.discard)(piece)
        found = np.isin(pieces, list(chosen - {0}))
        return torch.from_numpy(np.where(found, 10.0, -10.0)).float()[None, None]

    def upscale(self, logits: Tensor) -> Tensor:
        return F.interpolate(logits, size=3 * [SIDE], mode="nearest")


def cache_of(image: np.ndarray, model: Oracle | None = None) -> EmbeddingCache:
    return EmbeddingCache(model or Oracle(), image, CPU)


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


@pytest.fixture
def tube() -> np.ndarray:
    """A tube of 8 x 8 voxels, bent once, five windows long; beside it a separate ball."""
    image = np.full((48, 96, 160), -1, dtype=np.int16)
    image[16:24, 16:24, 8:152] = 1
    image[16:24, 16:88, 144:152] = 1
    image[36:44, 60:68, 40:48] = 1
    return image


@pytest.fixture
def small_tube(tube) -> np.ndarray:
    """The same at half the size, for tests of many clicks."""
    return tube[::2, ::2, ::2].copy()


def test_windows_grow_along_an_object_far_longer_than_one(tube) -> None:
    session = Session(cache_of(tube))
    session.click((20, 20, 12), 1)
    truth = tube > 0
    truth[36:44] = False
    assert dice((session.logits > 0).numpy(), truth) > 0.95
    assert 5 <= session.num_windows <= 20
    assert not session.stopped_early


def test_growing_ends_with_its_time_and_can_be_continued(tube) -> None:
    session, whole = Session(cache_of(tube), max_seconds=0.0), Session(cache_of(tube))
    for one in (session, whole):
        one.click((20, 20, 12), 1)
    assert session.num_windows == 1
    assert session.stopped_early
    session.grow()
    assert not session.stopped_early
    assert torch.equal(session.logits, whole.logits)


def test_an_earlier_state_answers_as_it_did(small_tube) -> None:
    session = Session(cache_of(small_tube))
    session.click((10, 10, 10), 1)
    before, answer = session.state(), session.logits.clone()
    session.click((20, 32, 22), 1)
    session.click((10, 10, 30), 0)
    assert not torch.equal(session.logits, answer)
    session.restore(before)
    assert torch.equal(session.logits, answer)


def test_a_chosen_centre_places_the_first_window(tube) -> None:
    clicks = (((20, 20, 12), 1), ((20, 20, 40), 1))
    plain = MarkedObject("tube", 1, clicks)
    default, _ = segment_objects(cache_of(tube), [plain])
    chosen, _ = segment_objects(cache_of(tube), [replace(plain, centre=(20, 20, 12))])
    session = Session(cache_of(tube))
    for voxel, sign in clicks:
        session.click(voxel, sign)
    assert np.array_equal(chosen > 0, (session.logits > 0).numpy())
    assert chosen.any() and default.any()


def test_an_object_inside_one_window_takes_one(tube) -> None:
    session = Session(cache_of(tube))
    session.click((40, 64, 44), 1)
    found = (session.logits > 0).numpy()
    assert session.num_windows == 1
    assert found[36:44, 60:68, 40:48].all() and found.sum() == 8**3


def test_growth_stops_at_the_end_of_the_volume() -> None:
    session = Session(cache_of(np.ones((40, 40, 40), dtype=np.int16)))
    session.click((20, 20, 20), 1)
    assert (session.logits > 0).all()
    assert not session.stopped_early


def test_growth_has_a_limit_and_says_so(tube, monkeypatch) -> None:
    monkeypatch.setattr("usam.prediction.windows.MAX_WINDOWS", 2)
    session = Session(cache_of(tube))
    session.click((20, 20, 12), 1)
    assert session.num_windows == 3 and session.stopped_early


def test_a_negative_click_takes_back_what_grew_from_a_leak(tube) -> None:
    session = Session(cache_of(tube))
    session.click((20, 20, 12), 1)
    session.click((20, 20, 14), 0)
    assert not (session.logits > 0).any()
    assert session.num_windows == 1


def test_a_click_outside_every_window_opens_one(tube) -> None:
    session = Session(cache_of(tube))
    session.click((40, 64, 44), 1)
    session.click((20, 84, 148), 1)
    found = (session.logits > 0).numpy()
    assert found[36:44, 60:68, 40:48].all() and found[20, 80, 148]


def test_each_window_is_encoded_once_for_all_clicks_and_objects(tube) -> None:
    model = Oracle()
    cache = cache_of(tube, model)
    Session(cache).click((20, 20, 12), 1)
    first = model.encoded
    again = Session(cache)
    again.click((20, 20, 12), 1)
    again.click((20, 20, 13), 1)
    assert model.encoded == first


def test_untouched_places_are_far_below_the_threshold(tube) -> None:
    session = Session(cache_of(tube))
    session.click((40, 64, 44), 1)
    assert session.logits[0, 0, 159] == -30


def test_a_given_mask_alone_is_an_answer_and_grows(tube) -> None:
    known = torch.zeros(tube.shape, dtype=torch.bool)
    known[16:24, 16:24, 12:20] = True
    session = Session(cache_of(tube), known)
    session.look((4, 4, 0))
    assert (session.logits > 0)[20, 20, 140]


def test_windows_weigh_most_in_their_middle() -> None:
    weight = window_weight(8, torch.device("cpu"))
    assert weight[4, 4, 4] == 1 and weight[0, 4, 4] == weight[7, 4, 4] == 0.5
    assert weight.min() > 0


def test_deepest_of_pieces_are_in_their_middles_largest_first() -> None:
    plane = np.zeros((12, 20), dtype=bool)
    plane[1:4, 1:4] = plane[3:12, 9:18] = plane[11, 0] = True
    assert deepest_of_pieces(plane, 2) == [(7, 13), (2, 2)]


# ------------------------------------------------------------------ prediction


def run(image, prompts, *, cache=None, init_mask=None):
    affine = np.diag([1.5, 1.5, 1.5, 1])  # the file's voxels are the volume's
    scan = ScanVolume(image, Grid(ScanHeader(Path("a"), "nifti", image.shape, 1, "int16", affine)))
    objects = [marked(one, scan, mm=prompts.mm) for one in prompts.objects]
    return segment_objects(cache or cache_of(image), objects, init_mask)


def test_objects_keep_their_own_labels(tube) -> None:
    objects = (
        ObjectPrompts("tube", 7, ((20, 20, 12, 1),)),
        ObjectPrompts("ball", 2, ((40, 64, 44, 1),)),
    )
    label, rows = run(tube, VolumePrompts(objects))
    assert label.dtype == np.uint8 and set(np.unique(label)) == {0, 2, 7}
    assert label[40, 64, 44] == 2 and label[20, 80, 148] == 7
    assert [row["name"] for row in rows] == ["tube", "ball"]
    assert rows[0]["windows"] > 4 and rows[1]["windows"] == 1


def test_a_box_is_clicked_in_its_centre_where_the_model_takes_no_boxes(tube) -> None:
    prompts = volume_prompts(None, [[36, 60, 40, 43, 67, 47]])
    label, rows = run(tube, prompts)
    assert label.sum() == 8**3 and rows[0]["box"] == "centre clicked"


def test_a_box_reaches_a_model_that_takes_boxes(tube) -> None:
    model = Oracle(num_point_embeddings=4)
    prompts = volume_prompts(None, [[36, 60, 40, 43, 67, 47]])
    _, rows = run(tube, prompts, cache=cache_of(tube, model))
    box = next(box for box in model.boxes if box is not None)
    assert box.tolist() == [[[13, 13, 13], [20, 20, 20]]]  # the window is centred on (39, 63, 43)
    assert rows[0]["box"] == "given to the model"


def test_a_mask_is_refined_by_its_own_label(tube) -> None:
    mask = np.zeros(tube.shape, dtype=np.uint8)
    mask[36:44, 60:68, 40:46] = 3
    objects = (ObjectPrompts("ball", 3),)
    label, _ = run(tube, VolumePrompts(objects), init_mask=mask)
    assert (label == 3).sum() == 8**3


def test_an_initial_mask_without_the_label_is_an_error(tube) -> None:
    mask = np.zeros(tube.shape, dtype=np.uint8)
    mask[36:44, 60:68, 40:46] = 7
    one = ObjectPrompts("ball", 1, ((40, 64, 44, 1),))
    with pytest.raises(ValueError, match=r"no label 1 \(ball\), its labels are: 7; relabel it"):
        run(tube, VolumePrompts((one,)), init_mask=mask)
    other = ObjectPrompts("tube", 7, ((20, 20, 12, 1),))  # one of several: used where it can be
    _, rows = run(tube, VolumePrompts((one, other)), init_mask=mask)
    assert [row["init_mask"] for row in rows] == [False, True]


def test_an_answer_that_is_not_finite_is_an_error(tube) -> None:
    class Broken(Oracle):
        def decode(self, *args, **how) -> Tensor:
            return super().decode(*args, **how) * float("nan")

    session = Session(cache_of(tube, Broken()))
    with pytest.raises(ValueError, match=r"not finite in the window at voxel \(24, 48, 28\)"):
        session.click((40, 64, 44), 1)


def test_embeddings_are_kept_within_a_bound(tube) -> None:
    model = Oracle()
    cache = EmbeddingCache(model, tube, CPU, max_bytes=3 * 4 * SIDE**3)
    for origin in ((0, 0, 0), (0, 0, 8), (0, 0, 16), (0, 0, 0), (0, 0, 24)):
        cache.embedding(origin)
    assert model.encoded == 4
    cache.embedding((0, 0, 0))  # used lately: kept
    assert model.encoded == 4
    cache.embedding((0, 0, 8))  # the one not used for the longest time went
    assert model.encoded == 5


@pytest.mark.parametrize(
    ("objects", "text"),
    [
        ((ObjectPrompts("liver"),), "liver has no prompt"),
        ((ObjectPrompts("liver", 1, ((1, 1, 1, 0),)),), "liver has only points outside it"),
    ],
)
def test_an_object_without_a_start_is_an_error(tube, objects, text) -> None:
    with pytest.raises(ValueError, match=text):
        run(tube, VolumePrompts(objects))
    with pytest.raises(ValueError, match="--init_mask has no label 1 .liver., its labels are: no"):
        run(tube, VolumePrompts(objects), init_mask=np.zeros(tube.shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "expected"),
        ('{"objects": [{}], "mm": "false"}', '"mm" must be true or false'),
        ('{"objects": [{"label": 1, "label": 2}]}', "'label' is given twice"),
        ('{"objects": []}', "at least one"),
        ('{"objects": [{"points": [[1, 2]]}]}', "x y z or x y z label"),
        ('{"objects": [{"points": [[1, 2, 3, 5]]}]}', "label is 1"),
        ('{"objects": [{"points": [[1, 2, NaN]]}]}', "NaN is not a number"),
        ('{"objects": [{"label": 0}]}', "from 1 to 254"),
        ('{"objects": [{"lable": 1}]}', "an object has box, boxes, centre, label, name, points"),
        ('{"objects": [{"name": "a"}, {"name": "a"}]}', "name 'a'"),
        ('{"objects": [{"name": "a", "label": 2}, {"name": "b"}]}', "label 2"),
        ('{"scans": {"other.nii.gz": {}}}', "has prompts for 'other.nii.gz'"),
        ("{", "line 1"),
    ],
)
def test_bad_prompt_files_are_named_in_one_line(tmp_path, content, text) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=text) as caught:
        from_file(path, "scan.nii.gz")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def from_file(path, name):
    scan = Path(name)
    return volume_prompts_of(Namespace(prompts=path, lps=False), read_prompts(path, [scan]), scan)


def test_prompt_files_name_objects(tmp_path) -> None:
    path = tmp_path / "prompts.json"
    one = {"name": "aorta", "points": [[1, 2, 3], [4, 5, 6, 0]]}
    two = {"name": "heart", "label": 9, "box": [1, 2, 3, 4, 5, 6]}
    path.write_text(
        json.dumps({"scans": {"a.nii": {"objects": [one, two], "mm": True}}}), encoding="utf-8"
    )
    prompts = from_file(path, "a.nii")
    assert prompts.mm
    assert prompts.objects[0] == ObjectPrompts("aorta", 1, ((1, 2, 3, 1), (4, 5, 6, 0)))
    assert prompts.objects[1] == ObjectPrompts("heart", 9, (), (1, 2, 3, 4, 5, 6))


# ------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("largest", [True, False])
def test_a_simulated_user_leads_the_oracle_to_the_object(small_tube, largest) -> None:
    generator = None if largest else torch.Generator().manual_seed(3)
    truth = small_tube > 0
    scores = [
        dice((x > 0).numpy(), truth)
        for _, x in simulated_clicks(cache_of(small_tube), truth, generator)
    ]
    assert len(scores) == 10 and scores[-1] > 0.95
    assert scores[0] < 1 and scores[-1] >= scores[0]


def test_failed_objects_count_as_zero_and_are_listed(small_tube, tmp_path) -> None:
    items = [Item(0, "a", 1, "tube"), Item(0, "a", 2, "nothing"), Item(1, "b", 1, "tube")]

    def open_case(number):
        if number:
            raise OSError("b cannot be read")
        return cache_of(small_tube), (small_tube > 0).astype(np.uint8)

    scores, failed = evaluate_objects(items, open_case, largest=True, spacing=1.5, seed=1)
    assert scores.shape == (3, 4, 2) and failed == items[1:]
    assert scores[0, -1, 0] > 0.95 and not scores[1:].any()
    summary = write_report(tmp_path, items, scores, failed=failed, facts={"model": "oracle"})
    assert summary["failed"] == ["a: nothing", "b: tube"]
    assert summary["classes"]["tube"]["dice"]["10 clicks"]["mean"] == scores[[0, 2], 3, 0].mean()
    assert len((tmp_path / "clicks.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3 * 4
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == summary
    assert (tmp_path / "clicks.png").stat().st_size > 1000
    assert "counted as 0: a: nothing, b: tube" in format_clicks(summary)


# ------------------------------------------------------------------ what makes clicks matter


def test_corrected_positions_let_a_click_meet_its_own_place() -> None:
    torch.manual_seed(1)
    places = torch.tensor([[5.0, 40, 20], [60, 3, 33], [30, 30, 8]])
    cells = (places // 16).long()
    met = {}
    for rel_pos in ("corrected", "published"):
        model = build_sam_med3d("vit_tiny", rel_pos)
        encoding = model.prompt_encoder.pe_layer
        grid = encoding.grid(4, swapped=rel_pos == "published")[0].flatten(1)  # (384, 64)
        attention = model.mask_decoder.transformer.final_attn_token_to_image
        query = attention.q_proj(encoding((places + 0.5) / 64))
        nearest = (query @ attention.k_proj(grid.T).T).argmax(dim=1)
        wanted = (cells * torch.tensor([16, 4, 1])).sum(dim=1)
        met[rel_pos] = int((nearest == wanted).sum())
    assert met["corrected"] == 3 > met["published"]
