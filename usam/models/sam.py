"""The original SAM: one object from points or a box, with a predicted quality.

U-SAM is built of the same parts; this is for files that have seen no training here.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from usam.models.sam_encoder import PATCH, PROMPT_WIDTH, SAM_SIZES, Preparation, SamViT
from usam.models.tiny_vit import TinyVit


class Sam(nn.Module):
    """SAM with all four masks and its quality head; parameter names and outputs are as published.

    sam_model: of SAM_MODELS. img_size: the side of its input. stride: of vit_t's embedding.
    preparation: of PREPARATIONS, the scale that its weights were trained with.
    """

    def __init__(self, sam_model: str, img_size: int, stride: int, preparation: str) -> None:
        super().__init__()
        self.img_size, self.preparation = img_size, Preparation(preparation)
        if sam_model == "vit_t":
            self.image_encoder = TinyVit(stride)
        else:
            self.image_encoder = SamViT(SAM_SIZES[sam_model], img_size, patch_embed=True)
        grid = (img_size // stride, img_size // stride)
        self.prompt_encoder = PromptEncoder(
            PROMPT_WIDTH, grid, (img_size, img_size), mask_in_chans=16
        )
        self.mask_decoder = MaskDecoder(
            transformer_dim=PROMPT_WIDTH,
            transformer=TwoWayTransformer(2, PROMPT_WIDTH, num_heads=8, mlp_dim=2048),
        )

    @torch.inference_mode()
    def embed(self, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Embeddings (N, 256, g, g) of images (N, 1 or 3, S, S) in [0, 1].

        size: rows and columns of the image itself, at its top left; the rest is padding, 0 after
        the preparation.
        """
        image = self.preparation(image)
        if size is not None:
            image = image.clone()
            image[..., size[0] :, :] = 0
            image[..., :, size[1] :] = 0
        encoder = self.image_encoder
        return encoder(image if isinstance(encoder, TinyVit) else encoder.patch_embed(image))

    @torch.inference_mode()
    def segment(
        self,
        embedding: Tensor,
        *,
        points: tuple[Tensor, Tensor] | None = None,
        box: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (S, S) of the object in one image, and its quality as predicted by SAM, a scalar.

        embedding (1, 256, g, g); points: coordinates (P, 2) pixels (x, y) of the S x S input and
        labels (P,), 1 object or 0 not; box (4,) pixels (x1, y1, x2, y2). A single point may mean
        several objects: of SAM's three masks the one with the best quality is taken, as published.
        """
        given = None if points is None else (points[0][None], points[1][None])
        sparse, dense = self.prompt_encoder(given, None if box is None else box[None], None)
        ambiguous = box is None and len(points[0]) == 1
        masks, quality = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=ambiguous,
        )
        best = int(quality[0].argmax())
        side = (self.img_size, self.img_size)
        whole = nn.functional.interpolate(masks[:, best : best + 1].float(), side, mode="bilinear")
        return whole[0, 0], quality[0, best].float()


def build_sam(
    sam_model: str, img_size: int, *, stride: int = PATCH, preparation: str = "sam"
) -> Sam:
    """A SAM with random weights in evaluation mode; arguments as those of `Sam`."""
    return Sam(sam_model, img_size, stride, preparation).eval()
