"""U-SAM (Zhang et al.): SAM's encoder and mask decoder between the two paths of a U-Net.

`build_usam` is what u-sam.py and scripts import; names and numbers are the published code's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usam.mask_decoder import MaskDecoder, PromptEncoder
from usam.sam_vit import SAM_MODELS, SamSize, SamViT
from usam.unet_path import DownPath

__all__ = ["SAM_MODELS", "USam", "build_usam"]

IMAGE_MEAN, IMAGE_STD = 0.1364736, 0.23238614  # of the CARE training slices, as published
ADAPTERS = ("u",)


class USam(nn.Module):
    """Segments an image, with or without prompts: see `forward`.

    A convolutional down path takes the place of SAM's patch embedding and hands its skips to the
    mask decoder's up path.
    """

    def __init__(self, size: SamSize, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes, self.img_size = num_classes, img_size
        self.sam = nn.ModuleDict(
            {
                "image_encoder": SamViT(size, img_size),
                "prompt_encoder": PromptEncoder(img_size),
                "mask_decoder": MaskDecoder(num_classes),
            }
        )
        self.backbone = DownPath(size.width)

    def forward(
        self,
        image: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, num_classes, H, W), float32.

        image (N, 1 or 3, H, W) float in [0, 1], H = W = img_size. points: coordinates (N, P, 2)
        float pixels (x, y) and labels (N, P), 1 object, 0 background, -1 not a point. boxes
        (N, 4) float pixels (x1, y1, x2, y2). Raises ValueError for other sizes or a number of
        prompts that is not the number of images.
        """
        self.check_input(image, points, boxes)
        # Channels last: pooling and convolutions are faster so on every device, and the tokens
        # come out contiguous. Each operation hands the layout on to the next.
        image = self.normalise(image).contiguous(memory_format=torch.channels_last)
        skips, bottleneck = self.backbone(image)
        embedding = self.sam.image_encoder(bottleneck.permute(0, 2, 3, 1))
        prompts = self.sam.prompt_encoder(points, boxes)
        position = self.sam.prompt_encoder.get_dense_pe()
        return self.sam.mask_decoder(embedding, position, prompts, skips=skips)

    def check_input(
        self, image: Tensor, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None
    ) -> None:
        """Raises ValueError where image and prompts do not fit this model or each other."""
        side = self.img_size
        if image.dim() != 4 or image.shape[1] not in (1, 3) or image.shape[2:] != (side, side):
            wanted, found = f"(N, 1 or 3, {side}, {side})", tuple(image.shape)
            raise ValueError(f"image must be {wanted}, found {found}")
        given = {"points": points and points[0], "boxes": boxes}
        for name, prompt in given.items():
            if prompt is not None and len(prompt) != len(image):
                raise ValueError(f"{name} are for {len(prompt)} images, the batch has {len(image)}")

    def normalise(self, image: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) in [0, 1] -> (N, 3, H, W) of the published mean and deviation."""
        return ((image - IMAGE_MEAN) / IMAGE_STD).expand(-1, 3, -1, -1)

    def parameter_groups(self, lr: float, lr_vit: float, lr_backbone: float) -> list[dict]:
        """Optimizer groups: decoder and prompts at lr, encoder at lr_vit, down path at lr_backbone.

        Every trained parameter is in one group.
        """
        sam = self.sam
        groups = [
            ("decoder", [sam.mask_decoder, sam.prompt_encoder], lr),
            ("encoder", [sam.image_encoder], lr_vit),
            ("down path", [self.backbone], lr_backbone),
        ]
        return [
            {
                "name": name,
                "params": [p for part in parts for p in part.parameters() if p.requires_grad],
                "lr": rate,
            }
            for name, parts, rate in groups
        ]


def build_usam(
    sam_model: str = "vit_b", num_classes: int = 3, img_size: int = 224, adapter: str = "u"
) -> USam:
    """A randomly initialised U-SAM on the encoder `sam_model` of SAM_MODELS.

    adapter "u" makes the tokens by the convolutional down path, as published. Raises ValueError
    for an unknown model or adapter, fewer than two classes or a size that 16 does not divide.
    """
    if sam_model not in SAM_MODELS:
        raise ValueError(f"sam_model must be one of {', '.join(SAM_MODELS)}, found {sam_model!r}")
    if adapter not in ADAPTERS:
        raise ValueError(f"adapter must be one of {', '.join(ADAPTERS)}, found {adapter!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes counts the background, so at least 2; found {num_classes}")
    return USam(SAM_MODELS[sam_model], num_classes, img_size)
