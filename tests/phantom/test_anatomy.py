"""The anatomy stand-in: an organ is drawn where its label lies, and always the same."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset import build_dataset, word
from dataset.phantom import anatomy
from dataset.phantom.tissue import Field, Patient, organ_of, scanner_noise
from dataset.prepare import command as prepare
from dataset.scans.orientation import to_canonical
from dataset.scans.read import read_label
from dataset.store.slices import SliceStore

LIVER, STOMACH, BLADDER = 1, 5, 14
AFFINE = np.array([[-1.5, 0, 0, 90], [0, -1.5, 0, 60], [0, 0, 2.5, -40], [0, 0, 0, 1]])


def label_map(seed: int = 0) -> np.ndarray:
    """(120, 100, 24): a liver, a stomach and a bladder as boxes, apart from each other."""
    label = np.zeros((120, 100, 24), np.uint8)
    shift = seed % 5
    label[20 + shift : 50, 30:60, 8:20] = LIVER
    label[65:95, 25:55, 10:18] = STOMACH
    label[50:70, 62:78, 2:8] = BLADDER
    return label


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    for number in range(4):
        path = folder / f"case_{number}.nii.gz"
        nib.save(nib.Nifti1Image(label_map(number), AFFINE), path)
    (folder / "._case_0.nii.gz").touch()
    return folder


@pytest.fixture(scope="module")
def store(labels: Path, tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    folder = tmp_path_factory.mktemp("stores") / "anatomy"
    anatomy.build(labels, folder, test_fraction=0.25, workers=1)
    return SliceStore(folder)


def test_the_store_holds_a_patient_a_label_map_and_trains(store: SliceStore) -> None:
    assert store.classes == ["background", *word.ORGANS]
    assert sorted(case["split"] for case in store.cases) == ["test", "train", "train", "train"]
    data = build_dataset("store", "train", store=store, val_fraction=0, img_size=64)
    # Slices of 2 x 2.5 mm from the first labelled one to the last: 2 to 19 of the label's 24.
    assert len(data) == 3 * 9
    assert data[0]["image"].shape == (1, 64, 64)
    splits = json.loads((store.folder / "splits.json").read_text(encoding="utf-8"))
    assert len(splits["test"]) == 1


def test_labels_lie_where_they_lay(labels: Path, store: SliceStore) -> None:
    for case in store.cases:
        label = nib.load(labels / f"{case['id']}.nii.gz")
        mask = np.load(store.folder / "cases" / f"{case['file']}.mask.npy")
        assert case["spacing"] == pytest.approx([5, 2, 2], rel=0.02)
        for organ in (LIVER, STOMACH, BLADDER):
            wanted = np.argwhere(np.asarray(label.dataobj) == organ).mean(axis=0)
            found = np.argwhere(mask == organ).mean(axis=0)[::-1]  # z, y, x -> x, y, z
            apart = nib.affines.apply_affine(label.affine, wanted) - nib.affines.apply_affine(
                np.array(case["affine"]), found
            )
            assert np.abs(apart).max() < 2.6  # half a slice along z
            assert np.abs(apart[:2]).max() < 1.01  # half a pixel
            ratio = (mask == organ).sum() * np.prod(case["spacing"])
            ratio /= (np.asarray(label.dataobj) == organ).sum() * 1.5 * 1.5 * 2.5
            assert ratio == pytest.approx(1, abs=0.15)


def test_organs_look_like_themselves_and_the_rest_like_a_patient(store: SliceStore) -> None:
    low, high = anatomy.WINDOW
    for case in store.cases:
        image, mask = (
            np.load(store.folder / "cases" / f"{case['file']}.{kind}.npy")
            for kind in ("image", "mask")
        )
        hu = image / 255 * (high - low) + low
        assert hu[mask == LIVER].mean() == pytest.approx(105, abs=50)
        assert hu[mask == BLADDER].mean() == pytest.approx(6, abs=25)
        assert hu[mask == LIVER].mean() > hu[mask == BLADDER].mean() + 30
        stomach = hu[mask == STOMACH]
        assert (stomach <= low + 1).mean() > 0.05  # gas
        assert image[:, 0].max() < 60  # air in front
        assert image[mask == 0].std() > 40  # fat, muscle, bone and what looks like organs


def test_noise_is_drawn_anew_in_every_slice(store: SliceStore) -> None:
    image, mask = (np.load(store.folder / f"cases/case_0.{kind}.npy") for kind in ("image", "mask"))
    inside = (mask[3] == LIVER) & (mask[4] == LIVER)
    first, second = (image[k][inside].astype(float) for k in (3, 4))
    assert 5 < (first - second).std() < 60
    assert np.corrcoef(first, second)[0, 1] < 0.9


def test_the_same_seed_draws_the_same_patients_and_another_others(
    labels: Path, store: SliceStore, tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    for number in (0, 2):
        (tmp_path / "two" / f"case_{number}.nii.gz").symlink_to(labels / f"case_{number}.nii.gz")
    anatomy.build(tmp_path / "two", tmp_path / "again", workers=1)
    anatomy.build(tmp_path / "two", tmp_path / "other", seed=1, workers=1)
    for name in ("case_0", "case_2"):
        wanted = (store.folder / f"cases/{name}.image.npy").read_bytes()
        assert (tmp_path / f"again/cases/{name}.image.npy").read_bytes() == wanted
        assert (tmp_path / f"other/cases/{name}.image.npy").read_bytes() != wanted


def test_any_names_may_be_given_and_each_looks_its_own_way(labels: Path, tmp_path: Path) -> None:
    names = [f"part {number}" for number in range(1, 15)]
    command = ["anatomy", "--input", str(labels), "--output", str(tmp_path / "out")]
    assert prepare.main([*command, "--classes", *names, "--workers", "1"]) == 0
    assert SliceStore(tmp_path / "out").classes[1:] == names
    assert organ_of("part 1") == organ_of("part 1") != organ_of("part 2")
    assert organ_of("Liver").mean == 105


def test_what_cannot_be_drawn_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "none").mkdir()
    command = ["anatomy", "--output", str(tmp_path / "out"), "--workers", "1", "--input"]
    assert prepare.main([*command, str(tmp_path / "none")]) == 2
    assert "no label maps in" in capsys.readouterr().err
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 4), np.uint8), AFFINE), tmp_path / "none" / "a.nii")
    assert prepare.main([*command, str(tmp_path / "none")]) == 2
    assert "a.nii" in capsys.readouterr().err
    nib.save(nib.Nifti1Image(np.full((8, 8, 4), 40, np.uint8), AFFINE), tmp_path / "none" / "a.nii")
    assert prepare.main([*command, str(tmp_path / "none")]) == 2
    assert "outside the class table" in capsys.readouterr().err


def test_a_field_is_smooth_through_slices_and_of_unit_size() -> None:
    field = Field(np.random.default_rng(0), (60.0, 200.0, 200.0), 10.0)
    planes = [field.plane(z, 100) for z in (5.0, 6.0, 40.0)]
    assert np.mean([plane.std() for plane in planes]) == pytest.approx(1, abs=0.15)
    near, far = (np.corrcoef(planes[0].ravel(), p.ravel())[0, 1] for p in planes[1:])
    assert near > 0.9
    assert abs(far) < 0.3
    assert scanner_noise(np.random.default_rng(0), 64, 20.0).std() == pytest.approx(20)


def test_partial_volume_mixes_what_meets_in_a_pixel() -> None:
    rng = np.random.default_rng(0)
    patient = Patient(rng, ["bladder"], (20.0, 64.0, 64.0), (40.0, 40.0))
    label = np.zeros((64, 64), np.uint8)
    label[:, 33:] = 1  # fills half of every finished pixel of column 16
    drawn = patient.hounsfield(label, 5.0)
    assert drawn[:, 33:].mean() == pytest.approx(6, abs=60)
    shrunk = anatomy._shrunk(drawn, 32)
    np.testing.assert_allclose(
        shrunk[:, 16], drawn.reshape(32, 2, 64)[:, :, 32:34].mean(axis=(1, 2)), rtol=1e-4
    )


def test_a_real_label_map_keeps_all_its_organs(shared_data: Path) -> None:
    path = shared_data / "word" / "labels_only" / "word_0014.nii.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    volume = to_canonical(read_label(path, 17))
    image, mask, _ = anatomy.draw(volume, list(word.ORGANS), np.random.default_rng(0))
    assert np.array_equal(np.unique(mask), np.unique(volume.slices))
    assert image.shape == mask.shape
    assert image.shape[1] == image.shape[2]
