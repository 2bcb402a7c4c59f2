"""U-SAM (Zhang et al.): SAM's encoder and mask decoder between the two paths of a U-Net.

`build_usam` is what u-sam.py and scripts import; names and numbers are the published code's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usam.cli.choices import ADAPTERS, SAM_MODELS, TUNINGS
from usam.models.lora import add_lora, is_lora
from usam.models.sam_decoder import MaskDecoder, PromptEncoder, SamMaskDecoder
from usam.models.sam_encoder import PATCH, SAM_SIZES, Preparation, SamViT
from usam.models.tiny_vit import TinyVit
from usam.models.unet import DownPath, SkipPath

IMAGE_MEAN, IMAGE_STD = 0.1364736, 0.23238614  # of the CARE training slices, as published


class USam(nn.Module):
    """Segments an image, with or without prompts: see `forward`.

    With the U-shaped adapter a convolutional down path takes the place of SAM's patch embedding
    and hands its skips to the mask decoder's up path; the encoder of vit_t always sees the image
    itself, and the down path gives skips alone. Without it this is SAM: its own patch embedding
    and its own decoder, with the same normalisation of the image.
    """

    def __init__(
        self,
        sam_model: str,
        num_classes: int,
        img_size: int,
        *,
        adapter: str = "u",
        stride: int = PATCH,
    ) -> None:
        super().__init__()
        self.sam_model, self.stride = sam_model, stride
        self.num_classes, self.img_size, self.adapter = num_classes, img_size, adapter
        with_u, tiny_vit = adapter == "u", sam_model == "vit_t"
        if tiny_vit:
            encoder = TinyVit(stride)
        else:
            encoder = SamViT(SAM_SIZES[sam_model], img_size, patch_embed=not with_u)
        decoder = MaskDecoder if with_u else SamMaskDecoder
        self.sam = nn.ModuleDict(
            {
                "image_encoder": encoder,
                "prompt_encoder": PromptEncoder(img_size, stride),
                "mask_decoder": decoder(num_classes, stride),
            }
        )
        self.prepare = Preparation({16: "sam", 4: "minmax"}[stride]) if tiny_vit else None
        self.backbone = None
        if with_u:
            self.backbone = SkipPath(stride) if tiny_vit else DownPath(SAM_SIZES[sam_model].width)

    @property
    def preparation(self) -> str:
        """The scale of the encoder's input: "usam" as published, for vit_t that of its weights.

        "sam" is SAM's mean and deviation, "minmax" is [0, 1]. The down path always has "usam".
        """
        return "usam" if self.prepare is None else self.prepare.name

    def forward(
        self,
        image: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, num_classes, H, W), float32.

        image (N, 1 or 3, H, W) float in [0, 1], H = W = img_size. points: coordinates (N, P, 2)
        float pixels (x, y) and labels (N, P), 1 object, 0 background, -1 not a point. boxes
        (N, 4) float pixels (x1, y1, x2, y2). embedding: what `embed` gave for the image, where
        it is known already. Raises ValueError for other sizes or a number of prompts that is not
        the number of images.
        """
        self.check_input(image, points, boxes)
        # Channels last: pooling and convolutions are faster so on every device, and the tokens
        # come out contiguous. Each operation hands the layout on to the next.
        decoder = self.sam.mask_decoder
        prompts = self.sam.prompt_encoder(points, boxes)
        position = self.sam.prompt_encoder.get_dense_pe()
        if embedding is None and self.encodes_the_image:
            embedding = self.embed(image)
        if self.backbone is None:
            return decoder(embedding, position, prompts)
        skips, bottleneck = self.backbone(self.normalise(image))
        if embedding is None:
            embedding = self.sam.image_encoder(bottleneck.permute(0, 2, 3, 1))
        return decoder(embedding, position, prompts, skips=skips)

    @property
    def encodes_the_image(self) -> bool:
        """Whether SAM's encoder sees the image itself rather than the output of the down path."""
        return self.adapter == "none" or self.sam_model == "vit_t"

    def embed(self, image: Tensor) -> Tensor:
        """SAM's embedding (N, 256, H / stride, W / stride) of images as `forward` takes them."""
        assert self.encodes_the_image
        encoder = self.sam.image_encoder
        if self.sam_model != "vit_t":
            return encoder(encoder.patch_embed(self.normalise(image)))
        return encoder(self.prepare(image))

    def check_input(
        self, image: Tensor, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None
    ) -> None:
        """Raises ValueError if image and prompts do not fit this model or each other."""
        side = self.img_size
        if image.dim() != 4 or image.shape[1] not in (1, 3) or image.shape[2:] != (side, side):
            wanted, found = f"(N, 1 or 3, {side}, {side})", tuple(image.shape)
            raise ValueError(f"image must be {wanted}, found {found}")
        given = {"points": points and points[0], "boxes": boxes}
        for name, prompt in given.items():
            if prompt is not None and len(prompt) != len(image):
                raise ValueError(f"{name}: {len(prompt)} given for a batch of {len(image)}")

    def normalise(self, image: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) in [0, 1] -> (N, 3, H, W), normalised by the published mean and SD."""
        image = ((image - IMAGE_MEAN) / IMAGE_STD).expand(-1, 3, -1, -1)
        return image.contiguous(memory_format=torch.channels_last)

    def parameter_groups(self, lr: float, lr_vit: float, lr_backbone: float) -> list[dict]:
        """Optimizer groups: decoder and prompts at lr, encoder at lr_vit, down path at lr_backbone.

        Every trained parameter is in one group; LoRA's are the encoder's. A part of which nothing
        is trained has none.
        """
        rates = {"decoder": lr, "encoder": lr_vit, "LoRA": lr_vit, "down path": lr_backbone}
        groups = [
            {"name": name, "params": [p for p in part if p.requires_grad], "lr": rates[name]}
            for name, part in self.parts().items()
        ]
        return [group for group in groups if group["params"]]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by part: decoder (with the prompts), encoder, LoRA and down path."""
        sam, encoder = self.sam, list(self.sam.image_encoder.named_parameters())
        return {
            "decoder": [*sam.mask_decoder.parameters(), *sam.prompt_encoder.parameters()],
            "encoder": [parameter for name, parameter in encoder if not is_lora(name)],
            "LoRA": [parameter for name, parameter in encoder if is_lora(name)],
            "down path": list(self.backbone.parameters()) if self.backbone else [],
        }


def build_usam(
    sam_model: str = "vit_b",
    num_classes: int = 3,
    img_size: int = 224,
    adapter: str = "u",
    tuning: str = "full",
    stride: int | None = None,
) -> USam:
    """A randomly initialised U-SAM on the encoder `sam_model` of SAM_MODELS.

    adapter: "u" makes the tokens by the convolutional down path, as published; "none" is SAM
    itself. tuning: what of the encoder is trained, all of it ("full"), LoRA on its queries and
    values ("lora") or nothing ("decoder"); decoder, prompts and down path always are. stride, of
    vit_t alone: 4, as LiteMedSAM has it and is built by default, or 16, as MobileSAM. Raises
    ValueError for an unknown choice, fewer than two classes or a size that 16 does not divide.
    """
    choices = {
        "sam_model": (sam_model, SAM_MODELS),
        "adapter": (adapter, ADAPTERS),
        "tuning": (tuning, TUNINGS),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, found {value!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes counts the background, so at least 2; found {num_classes}")
    if img_size <= 0 or img_size % PATCH:
        raise ValueError(f"img_size must be a positive multiple of {PATCH}, found {img_size}")
    if stride is None:
        stride = 4 if sam_model == "vit_t" else PATCH
    model = USam(sam_model, num_classes, img_size, adapter=adapter, stride=stride)
    if tuning == "lora":
        add_lora(model.sam.image_encoder)
    elif tuning == "decoder":
        model.sam.image_encoder.requires_grad_(False)
    return model
