"""The phantom draws the same bytes from a seed, looks like the data it stands for, and is hard.

Two tests measure how far simple means get, thresholds and twenty steps of training, and print it
where pytest runs without -n.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import default_collate

from dataset import build_dataset
from dataset.phantom import pelvis as phantom
from dataset.store.slices import SliceStore
from dataset.transforms import augment
from usam.evaluation.metrics import ClassCounts
from usam.models.usam import build_usam
from usam.training.losses import segmentation_loss

NORMAL, TUMOUR = 1, 2


def grey(hu: float) -> float:
    """The grey value of an attenuation in the phantom's window."""
    low, high = phantom.WINDOW
    return 255 * (hu - low) / (high - low)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[dict, np.ndarray, np.ndarray]]:
    """Twelve test patients: entry, image and mask each."""
    return [phantom.draw_case("test", number) for number in range(12)]


def small(folder: Path, **changes: int) -> Path:
    return phantom.build(folder, **{"train_cases": 2, "test_cases": 1, "num_slices": 3, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_seed_gives_the_same_bytes(tmp_path):
    first, second = contents(small(tmp_path / "a")), contents(small(tmp_path / "b"))
    assert first == second
    assert len(first) == 7
    other = contents(small(tmp_path / "c", seed=1))
    assert all(first[name] != other[name] for name in first)


def test_more_cases_leave_the_first_ones_alone(tmp_path):
    few, more = contents(small(tmp_path / "a")), contents(small(tmp_path / "b", train_cases=3))
    assert all(more[name] == few[name] for name in few if name != "index.json")


def test_train_and_test_share_no_patient(tmp_path):
    store = SliceStore(small(tmp_path / "store", test_cases=2))
    ids = {
        split: {store.cases[n]["id"] for n, _ in store.slices(split)} for split in ("train", "test")
    }
    assert len(ids["train"]) == len(ids["test"]) == 2
    assert not ids["train"] & ids["test"]
    images = {store.read(n, k)[0].tobytes() for n in range(4) for k in range(3)}
    assert len(images) == 12


def test_a_store_is_drawn_once_and_again_when_the_recipe_changes(tmp_path):
    recipe = {"train_cases": 1, "test_cases": 1, "num_slices": 1}
    store = phantom.open_store(tmp_path / "p", **recipe)
    stamp = (tmp_path / "p" / "index.json").stat().st_mtime_ns
    assert phantom.open_store(tmp_path / "p").digest == store.digest
    assert (tmp_path / "p" / "index.json").stat().st_mtime_ns == stamp
    again = phantom.open_store(tmp_path / "p", seed=5)
    assert again.index["recipe"]["seed"] == 5
    assert len(again.cases) == 2
    assert again.index["source"] != store.index["source"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="other files"):
        phantom.open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one case"):
        phantom.build(tmp_path / "p", train_cases=0, test_cases=0)


def test_case_has_the_store_s_form(drawn):
    entry, image, mask = drawn[0]
    assert image.shape == mask.shape == (8, 224, 224)
    assert image.dtype == mask.dtype == np.uint8
    spacing = entry["spacing"]
    assert spacing[0] == 5.0
    assert 1.5 < spacing[1] == spacing[2] < 1.8
    affine = np.array(entry["affine"])
    assert np.allclose(np.abs(np.diag(affine)), [spacing[2], spacing[1], spacing[0], 1])
    assert affine[0, 0] < 0 and affine[1, 1] < 0 < affine[2, 2]  # LPS indices -> RAS mm


def test_classes_are_present_and_most_slices_have_a_tumour(drawn):
    masks = np.concatenate([mask for _, _, mask in drawn])
    assert set(np.unique(masks)) == {0, 1, 2}
    assert (masks == NORMAL).any(axis=(1, 2)).all()
    share = (masks == TUMOUR).any(axis=(1, 2)).mean()
    assert 0.6 < share < 0.95
    assert all((mask == TUMOUR).any() for _, _, mask in drawn)


def test_rectum_is_one_piece_and_changes_little_between_slices(drawn):
    for _, _, mask in drawn:
        for below, above in zip(mask, mask[1:], strict=False):
            assert ndimage.label(below > 0, np.ones((3, 3)))[1] == 1
            shared = ((below > 0) & (above > 0)).sum()
            assert 2 * shared > 0.6 * ((below > 0).sum() + (above > 0).sum())


def test_grey_values_are_those_of_the_tissues(drawn):
    image = np.concatenate([image for _, image, _ in drawn])
    mask = np.concatenate([mask for _, _, mask in drawn])
    assert image.min() == 0
    assert image.max() == 255
    assert (image[:, :8] == 0).mean() > 0.95  # air above the patient
    tumour = np.median(image[mask == TUMOUR])
    assert grey(40) < tumour < grey(80)
    body = ndimage.binary_fill_holes(image[0] > grey(-140))
    fat = (image[0] > grey(-140)) & (image[0] < grey(-60)) & body
    muscle = (image[0] > grey(25)) & (image[0] < grey(90))
    assert fat.sum() > 2000
    assert muscle.sum() > 4000


def test_patients_differ(drawn):
    sizes = [(mask > 0).sum() for _, _, mask in drawn]
    assert max(sizes) > 1.3 * min(sizes)
    centres = np.array([ndimage.center_of_mass(mask > 0)[1:] for _, _, mask in drawn])
    assert (centres.std(axis=0) > 2).all()


def disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2


def nearest_part(region: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """The connected component of a bool region that lies nearest to a pixel."""
    parts, count = ndimage.label(region)
    if not count:
        return region
    places = ndimage.distance_transform_edt(parts == 0, return_indices=True)[1]
    return parts == parts[tuple(places[:, place[0], place[1]])]


def segment_by_thresholds(image: np.ndarray) -> np.ndarray:
    """What a careful person with thresholds and connected components gets from one slice.

    The place looked at lies in front of the sacrum, the bone at the midline behind the middle.
    The gas or stool nearest to it is the lumen; what is left of the soft tissue around it after
    an opening, the rectum; where the wall around the lumen is much thicker than elsewhere, the
    tumour. Without a lumen, the brighter side of the rectum is the tumour. image uint8 (H, W).
    """
    smooth = ndimage.gaussian_filter(image.astype(np.float32), 0.8)
    body = ndimage.binary_fill_holes(ndimage.binary_opening(smooth > grey(-140), iterations=2))
    rows, columns = np.nonzero(body)
    middle = int(columns.mean())
    bone = ndimage.binary_opening(smooth > grey(180))
    bone[: int(rows.mean()) + 10] = bone[:, : middle - 20] = bone[:, middle + 20 :] = False
    top = int(np.nonzero(bone.any(axis=1))[0].min()) if bone.any() else int(rows.max()) - 20
    seed = (top - 18, middle)
    box = np.zeros_like(body)
    box[top - 48 : top, middle - 26 : middle + 26] = True
    hollow = (smooth < grey(-60)) & (ndimage.minimum_filter(smooth, 3) < grey(-150)) & box
    lumen = nearest_part(ndimage.binary_opening(hollow) | (hollow & (smooth < 3)), seed)
    near = ndimage.distance_transform_edt(~lumen) < 22 if lumen.any() else box
    solid = ((smooth > grey(5)) & (smooth < grey(150))) | ndimage.binary_dilation(lumen)
    solid = ndimage.binary_opening(solid & near & box, disc(4))
    rectum = ndimage.binary_fill_holes(nearest_part(solid, seed) | lumen)
    mask = np.where(rectum, NORMAL, 0)
    mask[thick_part(smooth, rectum, lumen)] = TUMOUR
    return mask


def thick_part(smooth: np.ndarray, rectum: np.ndarray, lumen: np.ndarray) -> np.ndarray:
    """Where, seen from the lumen, the wall is over 1.4 times as thick as its median."""
    if lumen.sum() < 10:
        return rectum & (smooth > np.median(smooth[rectum])) if rectum.any() else rectum
    centre = ndimage.center_of_mass(lumen)
    y, x = np.indices(rectum.shape)
    sector = ((np.arctan2(y - centre[0], x - centre[1]) / (2 * np.pi) + 0.5) * 35.99).astype(int)
    depth = ndimage.distance_transform_edt(~lumen)
    wall = rectum & ~lumen
    thickness = np.array([depth[wall & (sector == k)].max(initial=0) for k in range(36)])
    return wall & (thickness > max(1.4 * np.median(thickness), 4))[sector]


def dice(predicted: np.ndarray, mask: np.ndarray, label: int) -> float:
    """Pooled Dice of one class."""
    both = ((predicted == label) & (mask == label)).sum()
    return 2 * both / ((predicted == label).sum() + (mask == label).sum())


def test_thresholds_do_not_find_the_tumour(drawn, capsys):
    image = np.concatenate([image for _, image, _ in drawn])
    mask = np.concatenate([mask for _, _, mask in drawn])
    thick = np.stack([segment_by_thresholds(plane) for plane in image])
    blurred = ndimage.gaussian_filter(image.astype(np.float32), (0, 2, 2))
    bright = np.where(thick > 0, np.where(blurred > grey(54), TUMOUR, NORMAL), 0)
    normal = dice(thick, mask, NORMAL)
    scores = [dice(predicted, mask, TUMOUR) for predicted in (thick, bright)]
    with capsys.disabled():
        print(
            f"\nphantom, thresholds: Dice {normal:.3f} normal rectum,"
            f" {scores[0]:.3f} tumour by thickness, {scores[1]:.3f} by brightness"
        )
    assert dice(thick > 0, mask > 0, True) > 0.45  # it finds rectums: no straw man
    assert 0.2 < max(scores) < 0.4


def batch(items: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (N, 1, H, W) in [0, 1] and mask (N, H, W) long of a Dataset's items."""
    joined = default_collate(items)
    return joined["image"].float() / 255, joined["mask"].long()


def test_twenty_steps_of_training_are_not_enough(tmp_path, capsys):
    """U-SAM itself: vit_tiny at 64 pixels from random weights, the published rates, batch 8."""
    options = {"data_root": tmp_path / "p", "img_size": 64, "val_fraction": 0}
    phantom.build(options["data_root"], train_cases=10, test_cases=4, num_slices=4)
    train, test = (build_dataset("phantom", split, **options) for split in ("train", "test"))
    model = build_usam("vit_tiny", num_classes=3, img_size=64).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 1e-4, 1e-4), fused=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train), generator=generator).tolist() * 4
    for number in range(20):
        chosen = order[8 * number : 8 * number + 8]
        image, mask = augment(*batch([train[index, 0] for index in chosen]), generator)
        loss = segmentation_loss(model(image), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts = ClassCounts(3, torch.device("cpu"))
    image, mask = batch([test[index] for index in range(len(test))])
    with torch.no_grad():
        counts.update(model.eval()(image), mask)
    summary = counts.summary(test.classes)
    with capsys.disabled():
        print(f"\nphantom, 20 steps of training: Dice {summary['dice']}")
    assert summary["mean_dice"] < 0.3
