"""Result files: what is replaced, what is refused, what is skipped, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset.files import SCRATCH
from tests.helpers.oracle import Oracle, coded, data_of, lps_affine, predict, truth, write
from usam.prediction.results import ResultFiles, is_result, result_names


@pytest.fixture
def done(tmp_path: Path) -> ResultFiles:
    """The results of a first prediction, with a picture and probabilities."""
    scan = write(tmp_path / "a.nii", coded(truth(3)), lps_affine())
    predict(scan, tmp_path / "o", Oracle(3), data_of(3), probabilities=True, overlay=True)
    return ResultFiles(tmp_path / "o", "out")


def test_a_label_map_of_the_users_is_refused(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path, "case00")
    manual = write(files.label_map, truth(3), lps_affine()).read_bytes()
    with pytest.raises(ValueError, match=r"case00_seg.nii.gz was not written by .* --overwrite"):
        files.check(set(), overwrite=False)
    files.check(set(), overwrite=True)
    files.description.write_text('{"author": "me"}', encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by this program"):
        files.check(set(), overwrite=False)
    assert files.label_map.read_bytes() == manual


def test_own_results_are_replaced_and_edited_ones_are_not(done: ResultFiles) -> None:
    done.check(set(), overwrite=False)
    edited = nib.load(done.label_map)
    write(done.label_map, 0 * np.asarray(edited.dataobj), edited.affine)
    with pytest.raises(ValueError, match=r"out_seg.nii.gz was edited .* --overwrite"):
        done.check(set(), overwrite=False)
    done.check(set(), overwrite=True)


def test_a_result_of_an_earlier_version_is_known(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path, "a")
    files.label_map.touch()
    old = {"checkpoint": "best.pth", "model": "u-sam vit_b", "classes": []}
    files.description.write_text(json.dumps(old), encoding="utf-8")
    files.check(set(), overwrite=False)


def test_pictures_and_probabilities_of_an_older_scan_go(done: ResultFiles, tmp_path: Path) -> None:
    assert done.overlay.exists() and done.probabilities.exists()
    other = write(tmp_path / "b.nii", coded(truth(3))[:5], lps_affine())
    predict(other, done.folder, Oracle(3), data_of(3, side=12))
    names = sorted(path.name for path in done.folder.iterdir())
    assert names == ["out_seg.json", "out_seg.nii.gz"]
    assert json.loads(done.description.read_text(encoding="utf-8"))["input"] == "b.nii"


@pytest.mark.parametrize("plain", [True, False])
def test_a_scan_is_never_replaced_by_its_results(tmp_path: Path, *, plain: bool) -> None:
    name = "a" if plain else "a_seg"
    scan = write(tmp_path / f"{name}.nii.gz", coded(truth(3)), lps_affine())
    files = ResultFiles(tmp_path, "a", plain=plain)
    with pytest.raises(ValueError, match="is a scan to segment, which results would replace"):
        files.check({scan}, overwrite=True)


def test_results_are_told_from_scans(done: ResultFiles, tmp_path: Path) -> None:
    assert is_result(done.label_map) and is_result(done.probabilities)
    assert not is_result(tmp_path / "a.nii")
    scan = write(done.folder / "out.nii.gz", coded(truth(3)), lps_affine())  # beside its results
    assert not is_result(scan)


def test_names_leave_out_nnunets_channel() -> None:
    scans = [Path(f"/x/{name}.nii.gz") for name in ("a_0000", "b_0000", "b_0001", "c", "c_0000")]
    assert result_names(scans) == ["a", "b", "b_0001", "c", "c_0000"]
    assert result_names([Path("/x/1/a_0000.nii"), Path("/x/2/a_0000.nii")]) == [
        "1_a_0000", "2_a_0000",
    ]  # fmt: skip


def test_nothing_unfinished_stays_after_an_error(tmp_path: Path) -> None:
    scan = write(tmp_path / "a.nii", coded(truth(3)), lps_affine())
    broken = Oracle(3)
    broken.values[0, 0] = float("nan")
    with pytest.raises(ValueError, match="output is not finite in slice 0"):
        predict(scan, tmp_path / "o", broken, data_of(3), probabilities=True)
    assert not list((tmp_path / "o").iterdir())
    assert not list(tmp_path.glob(f"{SCRATCH}*"))
