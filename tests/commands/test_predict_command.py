"""--predict as users run it: many scans, odd ones, prompts, DICOM folders."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dataset.files import SCRATCH
from dataset.scans.find import find_scans
from tests.conftest import ROOT
from tests.helpers.described import assert_described
from tests.helpers.oracle import (
    DEPTH,
    SIDE,
    coded,
    data_of,
    lps_affine,
    truth,
    turned,
    write,
)
from usam.cli.parser import parse_flags
from usam.models.usam import build_usam
from usam.prediction.results import result_names
from usam.training import checkpoint

ON_CPU = ("--device", "cpu", "--amp", "off")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a vit_tiny checkpoint with the given `data`; its path."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(**other: object) -> Path:
        data = data_of(3, **{"img_size": 32, "prompt_mode": 0, **other})
        path = folder / f"{len(list(folder.iterdir()))}.pth"
        model = build_usam("vit_tiny", num_classes=3, img_size=32)
        checkpoint.save(
            path,
            {"format": 1, "model": model.state_dict(), "args": {"sam_model": "vit_tiny"},
             "data": data, "progress": {}, "best": {}},
        )  # fmt: skip
        return path

    return make


@pytest.fixture(scope="module")
def command() -> Callable[..., None]:
    """u-sam.py's main, called with a command line."""
    spec = importlib.util.spec_from_file_location("u_sam", ROOT / "u-sam.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main(parse_flags([str(word) for word in words]))


def test_one_bad_scan_does_not_stop_the_others(tmp_path, tiny):
    good = [write(tmp_path / f"{n}.nii.gz", coded(truth()), lps_affine()) for n in "ab"]
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(good[0].read_bytes()[:200])
    words = ["--predict", good[0], bad, tmp_path / "none.nii", good[1], "--resume", tiny()]
    done = subprocess.run(
        [sys.executable, ROOT / "u-sam.py", *words, "--output_dir", tmp_path / "out",
         *ON_CPU, "--overlay", "--probabilities", "--largest_component", "--num_workers", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 3 and "bad.nii.gz" in done.stderr and "none.nii: no such" in done.stderr
    assert errors[-1].endswith("2 of 4 scans not segmented; see the errors above")
    assert "Traceback" not in done.stderr
    ends = ("overlay.png", "probabilities.nii", "seg.json", "seg.nii.gz")
    names = [f"{n}_{end}" for n in "ab" for end in ends]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert_described(tmp_path / "out", names=("a", "b"))
    image = nib.load(tmp_path / "out" / "a_seg.nii.gz")
    assert image.shape == (SIDE, SIDE, DEPTH) and image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, nib.load(good[0]).affine)


def test_results_in_the_folder_of_the_scans_are_skipped(tmp_path, tiny, command, capsys):
    write(tmp_path / "case_0000.nii.gz", coded(truth()), lps_affine())
    words = ["--predict", tmp_path, "--output_dir", tmp_path, "--resume", tiny(), *ON_CPU]
    command(*words, "--probabilities")
    names = {"case_0000.nii.gz", "case_seg.nii.gz", "case_seg.json", "case_probabilities.nii"}
    assert {path.name for path in tmp_path.iterdir()} == names
    capsys.readouterr()
    command(*words, "--probabilities")
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "skipped 2 results of earlier predictions" in capsys.readouterr().out


def test_a_prediction_imports_no_scoring_code(tmp_path, tiny):
    scan = write(tmp_path / "a.nii", coded(truth())[:, :, :1], lps_affine())
    words = ["--predict", scan, "--resume", tiny(), *ON_CPU, "--output_dir", tmp_path / "out"]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__');"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / "u-sam.py", *words],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    imported = set(done.stdout.split())
    assert "usam.prediction.slices" in imported
    scoring = ("usam.evaluation", "surface_distance", "jinja2", "SimpleITK")
    assert not [name for name in imported if name.startswith(scoring)]


def test_label_maps_are_named_as_nnunet_names_them(tmp_path, tiny, command):
    scan = write(tmp_path / "case_0000.nii.gz", coded(truth()), lps_affine())
    words = ["--predict", scan, "--resume", tiny(), *ON_CPU, "--names", "nnunet"]
    command(*words, "--output_dir", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"case.nii.gz", "case.json"}


def test_a_manual_label_map_is_kept_without_overwrite(tmp_path, tiny, command):
    scan = write(tmp_path / "case00.nii.gz", coded(truth()), lps_affine())
    manual = write(tmp_path / "case00_seg.nii.gz", truth(), lps_affine())
    before = manual.read_bytes()
    words = ["--predict", scan, "--resume", tiny(), *ON_CPU, "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="case00_seg.nii.gz was not written by this program"):
        command(*words)
    assert manual.read_bytes() == before
    command(*words, "--overwrite")
    assert manual.read_bytes() != before


def test_a_terminated_prediction_leaves_no_unfinished_file(tmp_path, tiny):
    scan = np.random.default_rng(0).integers(-200, 300, (32, 32, 20000)).astype(np.int16)
    nib.save(nib.Nifti1Image(scan, lps_affine()), tmp_path / "long.nii")
    words = ["--predict", tmp_path / "long.nii", "--resume", tiny(), *ON_CPU, "--probabilities"]
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, ROOT / "u-sam.py", *words, "--output_dir", out],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not list(out.glob(f"{SCRATCH}*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(out.glob(f"{SCRATCH}*"))
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(out.iterdir())


def odd_scans() -> dict[str, tuple[np.ndarray, np.ndarray, str | None]]:
    """Odd but honest scans, and broken ones with what is said of them."""
    hu, affine = coded(truth()), lps_affine()
    nan = hu.astype(np.float32)
    nan[0, 0, 0] = np.nan
    angle = np.eye(4)
    angle[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    return {
        "int32": (hu.astype(np.int32), affine, None),
        "float64": (hu.astype(np.float64), affine, None),
        "uint8": (truth(), affine, None),
        "one_slice": (hu[:, :, :1], affine, None),
        "one_column": (hu[:1], affine, None),
        "oblique": (hu, angle @ affine, None),
        "permuted": (*turned(hu, affine, "SAR"), None),
        "no_foreground": (np.full_like(hu, -1000), affine, None),
        "4d_of_one": (hu[..., None], affine, None),
        "4d": (np.stack([hu, hu], axis=3), affine, "holds 2 volumes; choose one with --channel"),
        "2d": (hu[:, :, 0], affine, "a 2D image"),
        "nan": (nan, affine, "1 voxels are NaN or infinite"),
        "flat_affine": (hu, np.diag([0.0, 1, 1, 1]), "matrix is singular"),
    }


@pytest.mark.parametrize("name", list(odd_scans()))
def test_an_odd_scan_works_or_is_refused_in_one_line(tmp_path, tiny, command, name):
    array, affine, text = odd_scans()[name]
    image = nib.Nifti1Image(array, None)
    image.header.set_sform(affine, code=1)
    image.header["pixdim"][1:4] = 1
    nib.save(image, tmp_path / "odd.nii.gz")
    words = ["--predict", tmp_path / "odd.nii.gz", "--resume", tiny(), *ON_CPU]
    words += ["--output_dir", tmp_path / "out", "--probabilities", "--overlay"]
    if text is None:
        command(*words)
        result = nib.load(tmp_path / "out" / "odd_seg.nii.gz")
        assert result.shape == array.shape[:3]
        np.testing.assert_array_equal(result.affine, nib.load(tmp_path / "odd.nii.gz").affine)
        return
    with pytest.raises(ValueError, match=text) as error:
        command(*words)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_channel_of_a_4d_scan_is_chosen_by_its_flag(tmp_path, tiny, command):
    array = np.stack([coded(truth())] * 2, axis=3)
    scan = write(tmp_path / "a.nii", array, lps_affine())
    words = ["--predict", scan, "--resume", tiny(), *ON_CPU, "--channel", 1]
    command(*words, "--output_dir", tmp_path / "out")
    assert nib.load(tmp_path / "out" / "a_seg.nii.gz").shape == (SIDE, SIDE, DEPTH)


def test_a_prompted_model_says_so_and_takes_prompts(tmp_path, tiny, command):
    scan = write(tmp_path / "a.nii", coded(truth()), lps_affine())
    words = ["--predict", scan, "--resume", tiny(prompt_mode=3), *ON_CPU]
    words += ["--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="give --point and --box"):
        command(*words)
    command(*words, "--point", 3, 4, 2, "--box", 1, 2, 8, 9, "--slice", 2)
    told = json.loads((tmp_path / "out" / "a_seg.json").read_text(encoding="utf-8"))
    assert told["prompted_slices"] == [2]
    other = write(tmp_path / "b.nii", coded(truth()), lps_affine())
    with pytest.raises(ValueError, match="--point is for one scan, --predict names 2"):
        command(*words[:2], other, *words[2:], "--point", 3, 4, 2)


@pytest.mark.parametrize(
    "words",
    [
        "--predict a.nii",
        "--predict a.nii --resume x --eval",
        "--overlay --resume x",
        "--predict a.nii --resume x --box 1 2 3 4 --slice 1 --slice 2",
        "--predict a.nii --resume x --mm",
        "--predict a.nii --resume x --point 1 2",
        "--predict a.nii --resume x --point 1 2 3 --prompts p.json",
    ],
)
def test_flags_that_do_not_fit_together_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_folders_name_series_or_the_scans_in_them(tmp_path):
    series, scans = tmp_path / "series", tmp_path / "scans"
    series.mkdir()
    scans.mkdir()
    (series / "1").write_bytes(bytes(128) + b"DICM")
    for name in ("b.nii.gz", "a.nrrd", ".hidden.nii", "notes.txt"):
        (scans / name).touch()
    (series / "label.nii.gz").touch()
    assert find_scans([series, scans, tmp_path / "none"]) == [
        series, scans / "a.nrrd", scans / "b.nii.gz", tmp_path / "none",
    ]  # fmt: skip


def test_results_of_scans_with_one_name_stay_apart():
    scans = [Path(p) for p in ("/x/1/ct.nii.gz", "/x/2/ct.nii.gz", "/y/2/ct.nii", "/x/mr.nii")]
    assert result_names(scans) == ["1_ct", "2_ct", "2_ct_2", "mr"]


def test_real_dicom_and_nifti_of_one_series_agree(tmp_path, shared_data, tiny, command):
    folder = shared_data / "dicom"
    words = ["--resume", tiny(), *ON_CPU, "--output_dir", tmp_path]
    command("--predict", folder, folder / "ct.nii.gz", *words)
    series = nib.load(tmp_path / "dicom_seg.nii.gz")
    nifti = nib.load(tmp_path / "ct_seg.nii.gz")
    assert series.shape == (512, 512, 3)
    np.testing.assert_array_equal(nifti.affine, nib.load(folder / "ct.nii.gz").affine)
    lps = [nib.as_closest_canonical(image) for image in (series, nifti)]
    np.testing.assert_allclose(lps[0].affine, lps[1].affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(lps[0].dataobj), np.asarray(lps[1].dataobj))
