"""Pictures of predictions: slices upright, clicks on their voxels, numbers of the scan's file."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset.scans.slices import ScanSlices
from dataset.scans.volumes import ScanVolume, read_volume
from tests.helpers.oracle import CODES, coded, data_of, lps_affine, truth, turned, write
from usam.prediction import planes
from usam.prediction.overlay import Panel
from usam.prediction.planes import draw_objects, upright
from usam.prediction.prompts import ObjectPrompts, scan_prompts
from usam.prediction.slice_prompts import marks_on_slices
from usam.prediction.volume_prompts import MarkedObject, marked


def volume(tmp_path: Path, codes: str = "RAS") -> ScanVolume:
    """A scan of 1.5 mm voxels, 12 x 14 x 16 in RAS, stored along other axes."""
    image = np.arange(12 * 14 * 16, dtype=np.int16).reshape(12, 14, 16)
    image, affine = turned(image, np.diag([1.5, 1.5, 1.5, 1]), codes)
    return read_volume(write(tmp_path / "a.nii", image, affine))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    """The panels of the next picture."""
    panels: list[Panel] = []
    monkeypatch.setattr(planes, "save_montage", lambda path, found, **how: panels.extend(found))
    return panels


def test_slices_of_a_volume_are_upright() -> None:
    image = np.zeros((3, 4, 5), np.uint8)
    image[2, :, :], image[:, 3, :], image[:, :, 4] = 1, 2, 3  # right to left, anterior, superior
    axial, coronal, sagittal = (
        upright(image, plane, 0) for plane in ("axial", "coronal", "sagittal")
    )
    assert axial.shape == (4, 3) and axial[0].tolist() == [2, 2, 2]  # anterior above
    assert axial[1:, 0].tolist() == [1, 1, 1]  # RAS x grows to the right: drawn on the left
    assert coronal.shape == (5, 3) and coronal[0].tolist() == [3, 3, 3]  # superior above
    assert sagittal.shape == (5, 4) and sagittal[1:, 0].tolist() == [2, 2, 2, 2]  # anterior left


@pytest.mark.parametrize("codes", CODES)
def test_a_clicked_voxel_is_drawn_where_it_lies(tmp_path, drawn, codes) -> None:
    scan = volume(tmp_path, codes)
    voxel = np.argwhere(np.asarray(nib.load(tmp_path / "a.nii").dataobj) == 1500)[0]
    one = marked(ObjectPrompts("liver", 1, ((*voxel.tolist(), 1),)), scan, mm=False)
    label = (scan.image == 1500).astype(np.uint8)
    assert label.sum() == 1
    draw_objects(tmp_path / "a.png", scan, label, [one], title="a")
    assert [panel.title.split()[0] for panel in drawn] == ["axial", "coronal", "sagittal"]
    for panel in drawn:
        ((x, y, sign),) = panel.points
        assert panel.labels[int(y), int(x)] == 1 and sign == 1
    axes = nib.aff2axcodes(nib.load(tmp_path / "a.nii").affine)
    numbers = [int(panel.title.split()[1]) for panel in drawn]
    for letters, number in zip(("SI", "AP", "RL"), numbers, strict=True):
        axis = next(n for n, letter in enumerate(axes) if letter in letters)
        assert number == voxel[axis]  # the file's own


def test_a_box_is_drawn_around_its_voxels(tmp_path, drawn) -> None:
    scan = volume(tmp_path)
    one = MarkedObject("liver", 1, (), ((2, 3, 4), (6, 9, 8)))
    label = np.zeros(scan.image.shape, np.uint8)
    label[2:7, 3:10, 4:9] = 1
    draw_objects(tmp_path / "a.png", scan, label, [one], title="a")
    for panel in drawn:
        ((x1, y1, x2, y2),) = panel.boxes
        rows, columns = np.nonzero(panel.labels)
        assert (x1, y1, x2, y2) == (columns.min(), rows.min(), columns.max(), rows.max())


def test_a_name_that_looks_like_a_formula_is_drawn(tmp_path) -> None:
    scan, one = volume(tmp_path), MarkedObject("a $x_ {", 1, (((2, 3, 4), 1),))
    label = np.zeros(scan.image.shape, np.uint8)
    label[2, 3, 4] = 1
    draw_objects(tmp_path / "a.png", scan, label, [one], title="$\\frac{ $")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("codes", CODES)
def test_marks_on_slices_lie_on_their_voxels(tmp_path, codes) -> None:
    label, affine = turned(truth(), lps_affine(), codes)
    voxel = np.argwhere(label == 5)[0]
    scan = ScanSlices(write(tmp_path / "a.nii", coded(label), affine), data_of())
    ((k, (points, _)),) = marks_on_slices(scan_prompts([voxel.tolist()], None, None), scan).items()
    x, y, _ = points[0]
    assert scan.volume.slices[k, round(y), round(x)] == coded(np.array(5))
