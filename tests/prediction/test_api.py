"""From Python: the pages' lines run as written, and give what --predict gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import usam
from tests.conftest import ROOT
from tests.helpers.command import run
from tests.helpers.oracle import coded, data_of, lps_affine, truth, turned, write
from tests.helpers.serving import random_weights
from tests.helpers.volume_layouts import SHAPE, SPACING, blob
from usam.models.usam import build_usam
from usam.training import checkpoint

MED3D = {"model": "sam-med3d", "sam_model": "vit_tiny", "rel_pos": "corrected"}


def save_tiny(path: Path, seed: int = 0, **data: object) -> Path:
    """A vit_tiny checkpoint for mixed prompts, its weights drawn from a seed."""
    torch.manual_seed(seed)
    model = build_usam("vit_tiny", num_classes=3, img_size=32)
    path.parent.mkdir(exist_ok=True)
    content = {"format": 1, "model": model.state_dict(), "args": {"sam_model": "vit_tiny"},
               "data": data_of(3, **{"img_size": 32, "prompt_mode": "mixed", **data}),
               "progress": {}, "best": {}}  # fmt: skip
    checkpoint.save(path, content)
    return path


def scan_file(path: Path, shape: tuple[int, ...] = (), codes: str = "PIR") -> Path:
    """A drawn scan, in axes of its own or padded to a shape."""
    label, affine = truth(), lps_affine((0.8, 0.8, 2.5))
    if shape:
        label = np.pad(label, [(0, a - b) for a, b in zip(shape, label.shape, strict=True)])
    else:
        label, affine = turned(label, affine, codes)
    return write(path, coded(label), affine)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two checkpoints and a scan."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("best", "last")):
        save_tiny(tmp_path / "chkpt" / f"{name}.pth", seed)
    scan_file(tmp_path / "scan.nii.gz")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., np.ndarray]:
    """The label map that `u-sam.py --predict scan.nii.gz` with these words writes."""

    def predict(*words: object) -> np.ndarray:
        done = run(capsys, "--predict", "scan.nii.gz", "--output_dir", "command", *words)
        assert done.code == 0, done.err
        return np.asarray(nib.load("command/scan_seg.nii.gz").dataobj)

    return predict


def python_blocks(page: str, title: str) -> list[str]:
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {title}\n")[2]
    return re.findall(r"^```python\n(.*?)^```", section.partition("\n## ")[0], re.M | re.S)


def test_the_readme_runs_as_written_and_gives_what_predict_gives(folder, command):
    scan_file(folder / "scan.nii.gz", (96, 96, 7))
    section, names = python_blocks("README.md", "From Python"), {}
    assert len(section) == 2
    for block in section:
        exec(block, names)
    found = names["result"]
    expected = command("--resume", "chkpt/best.pth")
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(found.label_map, expected)
    assert {path.name for path in folder.glob("predictions/*")} == {
        "scan_seg.json", "scan_seg.nii.gz",
    }  # fmt: skip
    for path in folder.glob("predictions/*"):
        assert path.read_bytes() == (folder / "command" / path.name).read_bytes()
    clicked = np.asarray(nib.load("clicked.nii.gz").dataobj)
    np.testing.assert_array_equal(clicked, names["session"].label_map)
    assert clicked.any() and names["logits"].shape == (1, 3, 224, 224)


def test_the_page_of_prediction_runs_as_written(folder, command, capsys):
    scan_file(folder / "scan.nii.gz", (96, 96, 7))
    names: dict = {}
    first, second = python_blocks("docs/prediction.md", "From Python")
    exec(first, names)
    words = ("--resume", "chkpt/best.pth", "chkpt/last.pth", "--tta", "flip", "--probabilities",
             "--largest_component", "--device", "cpu")  # fmt: skip
    expected = command(*words)
    files = [path.name for path in folder.glob("command/*")]
    written = {path.name for path in folder.glob("predictions/*")}
    assert written == {*files, "scan_overlay.png"} and len(files) == 3
    for name in files:
        found = (folder / "predictions" / name).read_bytes()
        assert found == (folder / "command" / name).read_bytes(), name
    np.testing.assert_array_equal(nib.load("liver.nii.gz").dataobj, expected)
    assert json.loads((folder / "liver.json").read_text())["classes"]
    exec(second, names)
    session, model = names["session"], names["model"]
    assert set(np.unique(session.label_map)) <= {0, 1, 2} and session.result.volumes_ml.keys() == {
        "object", "object 2"
    }  # fmt: skip
    np.testing.assert_array_equal(
        model.predict("scan.nii.gz", prompts={"points": [[90, 81, 4]]}).label_map,
        command("--resume", "chkpt/best.pth", "--point", 90, 81, 4),
    )


def test_every_form_of_a_scan_gives_the_label_map_of_its_file(folder):
    model = usam.load("chkpt/best.pth", device="cpu", amp="off")
    expected = model.predict("scan.nii.gz")
    image = nib.load("scan.nii.gz")
    array = np.asarray(image.dataobj)
    itk = sitk.ReadImage("scan.nii.gz")
    stack = nib.Nifti1Image(np.stack([array * 0, array], axis=3), image.affine)
    forms = {
        "nibabel": model.predict(image),
        "SimpleITK": model.predict(itk),
        "floats": model.predict(image.get_fdata(), affine=image.affine),
        "channel": model.predict(stack, channel=1),
    }
    for name, found in forms.items():
        np.testing.assert_array_equal(found.label_map, expected.label_map, err_msg=name)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5, err_msg=name)
        assert found.volumes_ml == pytest.approx(expected.volumes_ml, rel=1e-3)
        found.save(folder / name)
    placed = nib.load(folder / "nibabel" / "scan_seg.nii.gz")
    assert placed.header["sform_code"] == image.header["sform_code"]
    np.testing.assert_array_equal(placed.affine, image.affine)
    unsized = model.predict(array)
    assert set(unsized.volumes_ml.values()) == {None} and unsized.spacing is None
    assert "states no voxel size" in unsized.warnings[1]
    assert model.predict(array, spacing=(1, 1, 2)).spacing == (1, 1, 2)


def test_what_cannot_be_done_is_refused_in_a_sentence(folder):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        usam.load("none.pth")
    with pytest.raises(ValueError, match="--tta.*invalid choice"):
        usam.load("chkpt/best.pth", tta="rot")
    with pytest.raises(ValueError, match="sam_weight .* is for a fresh start"):
        usam.load("chkpt/best.pth", sam_weight="other.pth")
    model = usam.load("chkpt/best.pth", device="cpu")
    image = nib.load("scan.nii.gz")
    array = np.asarray(image.dataobj)
    for refused, match in (
        (lambda: model.predict("none.nii.gz"), "no such scan"),
        (lambda: model.predict([1, 2]), "a scan is a path"),
        (lambda: model.predict(array[0]), "2 axes"),
        (lambda: model.predict(array + np.nan), "NaN"),
        (lambda: model.predict(array, affine=np.eye(3)), "4 x 4"),
        (lambda: model.predict(array, affine=image.affine, spacing=(9, 9, 9)), "spacing is 9"),
        (lambda: model.predict(image, spacing=(1, 1, 1)), "for an array"),
        (lambda: model.predict(image, prompts={"point": 1}), 'prompts: expected {"points"'),
        (lambda: model.predict(image, prompts={"points": [[99, 0, 0]]}), "outside"),
        (lambda: model.predict(image, window=(1,)), "window"),
        (lambda: model.predict(image, init_mask="scan.nii.gz"), "init_mask"),
        (lambda: model.session(image).click((1.5, 2, 3)), "three whole numbers"),
        (lambda: model.session(image).click((99, 2, 3)), "outside the scan"),
        (lambda: model.session(image).result.save("out", overlay=True), "no picture"),
        (lambda: model.predict(image).save("scan.nii.gz", overwrite=True), "is a scan"),
        (lambda: model.predict(image).save("liver.mha"), "a folder, or a name"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
            refused()
        assert "\n" not in str(error.value)
    save_tiny(folder / "plain.pth", prompt_mode=0)
    with pytest.raises(ValueError, match="trained without prompts"):
        usam.load("plain.pth", device="cpu").session(image)


def test_sam_med3d_predicts_and_clicks_as_the_command(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    image, _, affine = blob(SHAPE, SPACING)
    nib.save(nib.Nifti1Image(image, affine), "scan.nii.gz")
    weights = random_weights(tmp_path / "weights.pth")
    model = usam.load(sam_weight=weights, device="cpu", amp="off", **MED3D)
    session = model.session("scan.nii.gz")
    session.click((10, 12, 8))
    mask = session.click(np.array([14, 12, 9]), inside=False)
    words = [word for name, value in MED3D.items() for word in (f"--{name}", value)]
    expected = command("--sam_weight", weights, *words, "--device", "cpu", "--amp", "off",
                       "--point", 10, 12, 8, "--point", 14, 12, 9, 0)  # fmt: skip
    found = model.predict(
        "scan.nii.gz", prompts={"objects": [{"points": [[10, 12, 8], (14, 12, 9, 0)]}]}
    )
    assert expected.any()
    np.testing.assert_array_equal(found.label_map, expected)
    again = model.predict("scan.nii.gz", prompts=session.prompts())
    np.testing.assert_array_equal(again.label_map == 1, mask)
    with pytest.raises(ValueError, match="has no prompt"):
        model.predict("scan.nii.gz")


def test_importing_usam_imports_no_torch():
    code = "import sys, usam; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
