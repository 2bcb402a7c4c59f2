"""Weight files of other programs: loaded where they fit, otherwise named for what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from usam.models.sam import build_sam
from usam.models.sam_med3d import build_sam_med3d
from usam.models.usam import USam, build_usam
from usam.weights.foreign import HUGGING_FACE, describe, to_sam_names
from usam.weights.lora import load_lora
from usam.weights.sam import load_sam_checkpoint
from usam.weights.sam_med3d import load_sam_med3d_checkpoint
from usam.weights.usam import load_usam, read_checkpoint

State = dict[str, Tensor]
NAMES = ("weight", "bias")


def random_values(model: torch.nn.Module) -> State:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def sam() -> State:
    """SAM's tensors, random, for the toy encoder."""
    return random_values(build_sam("vit_tiny", 64))


@pytest.fixture(scope="module")
def tiny_vit() -> Callable[[int], State]:
    made = {stride: random_values(build_sam("vit_t", 64, stride=stride)) for stride in (4, 16)}
    return made.__getitem__


def hugging_face(state: State) -> State:
    """The same tensors under the names of transformers' SamModel."""
    names = {
        ".neck.0.": ".neck.conv1.", ".neck.1.": ".neck.layer_norm1.", ".neck.2.": ".neck.conv2.",
        ".neck.3.": ".neck.layer_norm2.", "patch_embed.proj.": "patch_embed.projection.",
        "image_encoder.blocks.": "image_encoder.layers.", "image_encoder.": "vision_encoder.",
        "mask_downscaling.0.": "mask_embed.conv1.",
        "mask_downscaling.1.": "mask_embed.layer_norm1.",
        "mask_downscaling.3.": "mask_embed.conv2.",
        "mask_downscaling.4.": "mask_embed.layer_norm2.",
        "mask_downscaling.6.": "mask_embed.conv3.", "point_embeddings.": "point_embed.",
        "pe_layer.positional_encoding_gaussian_matrix": "shared_embedding.positional_embedding",
        "output_upscaling.0.": "upscale_conv1.", "output_upscaling.1.": "upscale_layer_norm.",
        "output_upscaling.3.": "upscale_conv2.", ".norm": ".layer_norm",
    }  # fmt: skip
    made = {}
    for name, value in state.items():
        new = name
        for old, other in names.items():
            new = new.replace(old, other)
        if "mlps." in name or "iou_prediction_head." in name:
            new = new.replace("layers.0.", "proj_in.").replace("layers.1.", "layers.0.")
            new = new.replace("layers.2.", "proj_out.")
        made[new] = value
    shared = made["prompt_encoder.shared_embedding.positional_embedding"]
    return made | {"shared_image_embedding.positional_embedding": shared}


def hq(state: State) -> State:
    """SAM-HQ: SAM's own tensors and those of a second mask decoder."""
    extra = ("hf_token.weight", "hf_mlp.layers.0.weight", "compress_vit_feat.0.weight",
             "embedding_encoder.0.weight", "embedding_maskfeature.0.weight")  # fmt: skip
    return state | {f"mask_decoder.{name}": torch.zeros(2, 2) for name in extra}


LAYOUTS: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "parallel": lambda state: {"model": {f"module.{n}": v for n, v in state.items()}},
    "hugging face": hugging_face,
    "SAM-HQ": hq,
}


def write(path: Path, content: object) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def toy(adapter: str = "none") -> USam:
    return build_usam("vit_tiny", 3, 64, adapter)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(tmp_path: Path, sam: State, layout: str) -> None:
    model, wanted = toy(), toy()
    load_sam_checkpoint(wanted, write(tmp_path / "bare.pth", sam))
    load_sam_checkpoint(model, write(tmp_path / "other.bin", LAYOUTS[layout](sam)))
    for name, value in wanted.sam.image_encoder.state_dict().items():
        assert torch.equal(model.sam.image_encoder.state_dict()[name], value), name
    decoder = wanted.sam.mask_decoder.transformer.state_dict()
    for name, value in model.sam.mask_decoder.transformer.state_dict().items():
        assert torch.equal(decoder[name], value), name


@pytest.mark.parametrize("layout", ["bare", "hugging face", "SAM-HQ"])
def test_safetensors_are_read_whatever_the_file_is_called(
    tmp_path: Path, sam: State, layout: str
) -> None:
    state = {name: value.clone() for name, value in LAYOUTS[layout](sam).items()}
    path = write(tmp_path / "model.safetensors", state).rename(tmp_path / "model.pth")
    model = toy("u")
    load_sam_checkpoint(model, path)
    name = "image_encoder.blocks.0.mlp.lin1.weight"
    assert torch.equal(model.sam.state_dict()[name], sam[name])


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("adapter", ["u", "none"])
def test_tiny_vit_files_load_into_their_own_stride(
    tmp_path: Path, tiny_vit: Callable[[int], State], stride: int, adapter: str
) -> None:
    state = dict(tiny_vit(stride))
    if stride == 16:  # MobileSAM's file holds ImageNet's classifier as well
        state["image_encoder.head.weight"] = torch.zeros(1000, 320)
        state["image_encoder.norm_head.bias"] = torch.zeros(320)
    path = write(tmp_path / "tiny.pt", state)
    model = build_usam("vit_t", 3, 64, adapter, stride=stride)
    load_sam_checkpoint(model, path)
    own = model.sam.state_dict()
    assert all(torch.equal(own[n], v) for n, v in state.items() if ".layers.2.blocks" in n)
    other = build_usam("vit_t", 3, 64, adapter, stride=20 - stride)
    with pytest.raises(ValueError, match="patch_embed.seq.0.c.weight has shape"):
        load_sam_checkpoint(other, path)


def test_files_that_do_not_fit_are_named_for_what_they_are(
    tmp_path: Path, sam: State, tiny_vit: Callable[[int], State]
) -> None:
    adapters = {
        f"image_encoder.blocks.{n}.Adapter.channel.0.weight": torch.zeros(2) for n in (0, 1)
    }
    contents = {
        "MobileSAM weights .vit_t.; --sam_model is vit_tiny": tiny_vit(16),
        "LiteMedSAM weights .vit_t.; --sam_model is vit_tiny": tiny_vit(4),
        "SAM-Med2D weights, which are not supported .their encoder has": {"model": sam | adapters},
        "SAM-Med3D weights": {"model_state_dict": build_sam_med3d("vit_tiny").state_dict()},
        "SAM 2 weights": {"model": {"image_encoder.trunk.pos_embed": torch.zeros(1)}},
        "weights of U-SAM, which --resume and --init read": {"model": toy().state_dict()},
        "LoRA of rank 4, which --lora_weight reads": {"w_a_000": torch.zeros(4, 96)},
        "2 tensors of an unknown model .fc.bias": {f"fc.{n}": torch.ones(1) for n in NAMES},
        "SAM vit_b weights; --sam_model is vit_tiny": {
            **sam, "image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)
        },
        "no tensors by name": {"model": {"lr": 0.1}},
    }  # fmt: skip
    for number, (match, content) in enumerate(contents.items()):
        path = write(tmp_path / f"{number}.pth", content)
        with pytest.raises(ValueError, match=f"{number}.pth holds .*{match}") as error:
            load_sam_checkpoint(toy(), path)
        assert "\n" not in str(error.value)


def test_sam_med3d_names_files_of_others(tmp_path: Path, sam: State) -> None:
    for state, match in (
        (sam, "of an unknown model|SAM vit_tiny"),
        ({"a": torch.ones(1)}, "1 tens"),
    ):
        path = write(tmp_path / "sam.pth", state)
        with pytest.raises(ValueError, match=f"({match}).*--model sam-med3d needs"):
            load_sam_med3d_checkpoint(path)
    volumes = {f"module.{n}": v for n, v in build_sam_med3d("vit_tiny").state_dict().items()}
    path = write(tmp_path / "sam3d.safetensors", volumes)
    assert load_sam_med3d_checkpoint(path)[1]["num_point_embeddings"] == 2


def test_a_lora_of_another_rank_says_so(tmp_path: Path) -> None:
    model = build_usam("vit_tiny", 3, 64, "none", "lora")
    tensors = {}
    for index in range(8):
        tensors[f"w_a_{index:03d}"], tensors[f"w_b_{index:03d}"] = (
            torch.ones(8, 96),
            torch.ones(96, 8),
        )
    with pytest.raises(ValueError, match="LoRA of rank 8, wanted 4"):
        load_lora(model, write(tmp_path / "lora.pth", tensors))
    with pytest.raises(ValueError, match="1 tensors? of an unknown model.*needs a LoRA file"):
        load_lora(model, write(tmp_path / "other.pth", {"fc.weight": torch.ones(1)}))


BAD = {
    "NaN": lambda value: value.index_fill(0, torch.tensor(0), float("nan")),
    "infinite": lambda value: value.index_fill(0, torch.tensor(0), float("inf")),
    "int32": lambda value: value.int(),
    "bool": lambda value: value.bool(),
}


@pytest.mark.parametrize("kind", BAD)
def test_weights_that_are_not_finite_or_not_floating_are_named(
    tmp_path: Path, sam: State, kind: str
) -> None:
    name = "mask_decoder.iou_token.weight"
    path = write(tmp_path / "sam.pth", sam | {name: BAD[kind](sam[name])})
    model = toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"sam.pth: {name} holds {kind} values"):
        load_sam_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_of_ours_with_bad_values_is_named(tmp_path: Path) -> None:
    model = toy("u")
    data = {"classes": ["background", "a", "b"], "img_size": 64}
    content = {
        "format": 1,
        "model": model.state_dict(),
        "args": {"sam_model": "vit_tiny"},
        "data": data,
    }
    name = "backbone.inc.norm.running_var"
    content["model"][name] = torch.full_like(content["model"][name], float("inf"))
    path = write(tmp_path / "best.pth", content)
    with pytest.raises(ValueError, match=f"best.pth: {name} holds infinite values"):
        load_usam(read_checkpoint(path), path, None, merge=True)
    content["model"][name] = torch.ones(content["model"][name].shape)
    counter = "backbone.inc.norm.num_batches_tracked"
    content["model"][counter] = torch.tensor(7)  # integer buffers are as they are
    load_usam(read_checkpoint(write(path, content)), path, None, merge=True)


def test_old_torch_files_say_so(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="saved by torch before 1.6"):
        load_sam_checkpoint(toy(), tmp_path / "old.pth")


def test_descriptions_and_names_agree(sam: State) -> None:
    assert to_sam_names(hugging_face(sam)).keys() == sam.keys()
    assert describe(sam) == "SAM vit_tiny weights"
    assert describe(hq(sam)) == "SAM-HQ vit_tiny weights"
    assert len({pattern for pattern, _ in HUGGING_FACE}) == len(HUGGING_FACE)
