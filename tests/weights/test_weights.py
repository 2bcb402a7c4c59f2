"""Weights from elsewhere come in whole, by name, or are refused with the reason.

Official and published files are imitated with their real names and shapes; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import build_sam_vit_l

from tests.helpers.fill import fill
from usam.models.usam import USam, build_usam
from usam.weights import sam as sam_file
from usam.weights import usam as weights

FILLED = ("image_encoder.pos_embed", "image_encoder.blocks.0.attn", "image_encoder.blocks.2.attn")


@pytest.fixture(scope="module")
def conversion():
    """The recorded table: what becomes of each official tensor."""
    path = Path(__file__).parents[1] / "data" / "usam_sam_conversion.tsv"
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}


@pytest.fixture(scope="module")
def official(conversion, tmp_path_factory) -> Path:
    """A file with the names and shapes of sam_vit_b_01ec64.pth; mostly zeros that take no room."""
    state = {}
    for name, row in conversion.items():
        if row["official_shape"] == "-":
            continue
        shape = tuple(int(n) for n in row["official_shape"].split(","))
        values = torch.from_numpy(fill(name, shape)) if name.startswith(FILLED) else None
        state[name] = torch.zeros(()).expand(shape) if values is None else values
    assert len(state) == 314
    return save(state, tmp_path_factory.mktemp("weight") / "sam_vit_b_01ec64.pth")


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("img_size", [224, 256])
def test_official_weights_are_resized_as_recorded(official, recorded, img_size):
    model = build_usam("vit_b", 3, img_size)
    sam_file.load_sam_checkpoint(model, official)
    wanted = np.load(recorded / "usam_sam_conversion.npz")
    encoder = model.sam.image_encoder
    found = {
        "pos_embed": encoder.pos_embed[..., ::32],
        "global_rel_pos_h": encoder.blocks[2].attn.rel_pos_h,
        "windowed_rel_pos_h": encoder.blocks[0].attn.rel_pos_h,
    }
    for name, value in found.items():
        expected = wanted[f"{name}_{img_size}"]
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_report_agrees_with_the_recorded_table(official, conversion):
    model = build_usam("vit_b", 3, 224)
    report = sam_file.load_sam_checkpoint(model, official)
    own = {name.removeprefix("sam.") for name in model.state_dict()}
    status = {name: row["status"] for name, row in conversion.items()}
    for name in own:
        wanted = status.get(name, "left_at_init")  # the down path is not in the table
        assert name in getattr(report, wanted), (name, wanted)
    total = len(report.taken) + len(report.resized) + len(report.left_at_init)
    assert total == len(own)
    official_names = {n for n, row in conversion.items() if row["official_shape"] != "-"}
    assert set(report.ignored) == official_names - {*report.taken, *report.resized}
    assert "9 resized" in str(report)
    assert "up4" in str(report)
    assert "output_upscaling" in str(report)


def test_another_encoders_file_is_refused(tmp_path):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_sam_vit_l().state_dict().items()}
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    path = save(state, tmp_path / "sam_vit_l_0b3195.pth")
    with torch.device("meta"):
        model = build_usam("vit_b")
    with pytest.raises(
        ValueError, match="sam_vit_l_0b3195.pth holds SAM vit_l weights; --sam_model is vit_b"
    ):
        sam_file.load_sam_checkpoint(model, path)


def tiny_sam(model: USam) -> dict[str, torch.Tensor]:
    """The tensors of `model` that SAM has."""
    state = {name.removeprefix("sam."): value for name, value in model.state_dict().items()}
    return {name: value for name, value in state.items() if name.startswith(sam_file.TAKEN["u"])}


@pytest.fixture
def tiny() -> USam:
    return build_usam("vit_tiny", 3, 64)


def test_missing_and_unknown_tensors_are_named(tiny, tmp_path):
    state = tiny_sam(tiny)
    del state["image_encoder.neck.0.weight"]
    path = save(state | {"video.weight": torch.zeros(1)}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="missing image_encoder.neck.0.weight; unexpected video"):
        sam_file.load_sam_checkpoint(tiny, path)


def test_a_refused_file_changes_nothing(tiny, tmp_path):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    state = {name: value + 1 for name, value in tiny_sam(tiny).items()}
    state["mask_decoder.iou_token.weight"] = torch.zeros(2, 256)
    with pytest.raises(ValueError, match=r"iou_token.weight has shape \(2, 256\)"):
        sam_file.load_sam_checkpoint(tiny, save(state, tmp_path / "sam.pth"))
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(print, protocol=2)])
def test_damaged_and_unsafe_files_are_refused(tiny, tmp_path, content):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.pth is damaged or not a plain checkpoint"):
        sam_file.load_sam_checkpoint(tiny, path)
    with pytest.raises(ValueError, match="bad.pth is damaged or not a plain checkpoint"):
        weights.read_checkpoint(path)


# ------------------------------------------------------------------ where weights come from


def test_random_weights_are_said(tiny):
    assert "random weights" in weights.initialize(tiny, "vit_b", "none")
    assert "random weights" in weights.initialize(tiny, "vit_tiny", None)


def test_default_file_is_the_official_one_in_weight(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weight").mkdir()
    save(tiny_sam(tiny), tmp_path / "weight" / "sam_vit_l_0b3195.pth")
    assert "weight/sam_vit_l_0b3195.pth: " in weights.initialize(tiny, "vit_l", None)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the download address."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(sam_file, "SAM_URL", folder.as_uri() + "/")
    return folder


def serve(folder: Path, content: bytes, promised: str, monkeypatch) -> str:
    name = f"sam_vit_b_{promised}.pth"
    (folder / name).write_bytes(content)
    monkeypatch.setattr(sam_file, "SAM_FILES", {"vit_b": name})
    return name


def test_download_arrives_whole_under_its_name(server, tmp_path, monkeypatch):
    content = b"weights" * 500_000
    name = serve(server, content, hashlib.md5(content).hexdigest()[:6], monkeypatch)
    sam_file.download_sam(tmp_path / "weight" / name)
    assert (tmp_path / "weight" / name).read_bytes() == content
    assert [file.name for file in (tmp_path / "weight").iterdir()] == [name]


def test_damaged_download_is_refused_and_removed(server, tmp_path, monkeypatch):
    name = serve(server, b"half of it", "0123ab", monkeypatch)
    with pytest.raises(ValueError, match="damaged download: MD5 .*, not 0123ab"):
        sam_file.download_sam(tmp_path / "weight" / name)
    assert list((tmp_path / "weight").iterdir()) == []


def test_without_a_network_the_error_says_where_to_get_it(server, tmp_path):
    path = tmp_path / "weight" / "sam_vit_h_4b8939.pth"
    with pytest.raises(FileNotFoundError, match="no SAM checkpoint at .*download it from .*put it"):
        sam_file.download_sam(path)
    assert list(path.parent.iterdir()) == []


def test_a_file_that_is_not_official_is_not_looked_for(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="mine.pth; official files are sam_vit_b_01ec64"):
        weights.initialize(tiny, "vit_b", tmp_path / "mine.pth")


# ------------------------------------------------------------------ U-SAM checkpoints


def published(model: USam) -> dict:
    """`model` as the published code would have saved it."""
    unused = {name: torch.zeros(1) for name in weights.UNUSED}
    flags = argparse.Namespace(epochs=100, prompt_mode=1, dataset="rectum", resume="")
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
    state = model.state_dict() | unused
    return {"model": state, "optimizer": optimizer, "epoch": 41, "args": flags}


def test_skipped_names_are_those_without_effect(recorded):
    with (recorded / "usam_vit_b_224_c3.tsv").open(newline="", encoding="utf-8") as file:
        names = {row["name"] for row in csv.DictReader(file, delimiter="\t")}
    with torch.device("meta"):
        own = set(build_usam().state_dict())
    assert names - own == weights.UNUSED


def test_published_checkpoint_reads_as_ours(tiny, tmp_path):
    path = save(published(tiny), tmp_path / "best.pth")
    checkpoint = weights.read_checkpoint(path)
    assert weights.points_are_row_col(checkpoint)
    assert checkpoint["args"]["sam_model"] == "vit_tiny"
    assert checkpoint["args"]["model"] == "u-sam"
    assert checkpoint["data"]["img_size"] == 64
    assert len(checkpoint["data"]["classes"]) == 3
    assert checkpoint["data"]["prompt_mode"] == 1
    assert checkpoint["progress"]["epoch"] == 41
    other = build_usam("vit_tiny", 3, 64).eval()
    other.load_state_dict(checkpoint["model"])
    image = torch.rand(1, 1, 64, 64)
    assert torch.equal(other(image), tiny.eval()(image))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("backbone.inc.conv.bias"), "missing backbone.inc.conv.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda state: state.pop("sam.image_encoder.pos_embed"), "missing sam.image_encoder.pos"),
    ],
)
def test_published_checkpoint_with_other_names_is_refused(tiny, tmp_path, change, message):
    content = published(tiny)
    change(content["model"])
    with pytest.raises(ValueError, match=message):
        weights.read_checkpoint(save(content, tmp_path / "best.pth"))


def test_our_checkpoints_read_unchanged(tiny, tmp_path):
    content = {"format": 1, "model": tiny.state_dict(), "args": {}, "data": {"img_size": 64}}
    content["data"]["classes"] = ["background", "object"]
    checkpoint = weights.read_checkpoint(save(content, tmp_path / "last.pth"))
    assert checkpoint.keys() == content.keys()
    assert not weights.points_are_row_col(checkpoint)


def test_a_checkpoint_of_another_scale_than_its_weights_is_refused(tiny):
    data = {"img_size": 64, "classes": ["background", "a", "b"], "preparation": tiny.preparation}
    saved = {"model": tiny.state_dict(), "args": {"sam_model": "vit_tiny"}, "data": data}
    weights.load_usam(saved, Path("a.pth"), None, merge=False)
    data["preparation"] = "minmax"
    with pytest.raises(ValueError, match="trained on the scale 'minmax', its weights are for 'us"):
        weights.load_usam(saved, Path("a.pth"), None, merge=False)


def test_neither_ours_nor_published_is_refused(tmp_path):
    path = save({"weights": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth is not a checkpoint of format 1"):
        weights.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        weights.read_checkpoint(tmp_path / "absent.pth")


def test_init_takes_what_fits_of_a_model_with_other_classes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = build_usam("vit_tiny", 5, 64)
    state = {"format": 1, "model": other.state_dict(), "args": {}, "data": {}}
    path = save(state, tmp_path / "other.pth")
    model = build_usam("vit_tiny", 3, 32)
    said = weights.initialize(model, "vit_tiny", None, init=path)
    assert "new: sam.mask_decoder.final_output.3.weight" in said
    assert torch.equal(model.backbone.inc.conv.weight, other.backbone.inc.conv.weight)
    assert model.sam.image_encoder.pos_embed.shape == (1, 2, 2, 96)
    with pytest.raises(ValueError, match="no encoder block fits"):
        weights.initialize(build_usam("vit_b", 3, 32), "vit_b", None, init=path)
    data = {"classes": ["a", "b"], "img_size": 64, "digest": "store"}
    path = save(state | {"data": data}, tmp_path / "seen.pth")
    run = data | {"dataset": None, "fold_digest": "cases"}
    with pytest.raises(ValueError, match="--fold 1: --init .*seen.pth was trained without --fold"):
        weights.initialize(model, "vit_tiny", None, init=path, fold=1, data=run)
