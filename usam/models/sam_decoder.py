"""U-SAM's prompt encoder and mask decoders, built on those of `segment_anything`.

usam.model joins them to the image encoder; names are those of the published code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import PromptEncoder as SamPromptEncoder
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from usam.models.full_precision import full_precision
from usam.models.sam_encoder import PATCH, PROMPT_WIDTH
from usam.models.unet import SKIP_WIDTHS, UpBlock, conv_norm_relu, two_convolutions

NUM_MASK_TOKENS = 32
MAP_WIDTH = 32  # channels of the maps that the mask tokens weigh


class PromptEncoder(SamPromptEncoder):
    """SAM's prompt encoder for points and boxes, in float32, without waiting for the device.

    Mask prompts are left out. The embedding of negative points (label 0) is never trained by
    U-SAM, so it is frozen; SAM's value serves where negative points are given.
    """

    def __init__(self, img_size: int, stride: int = PATCH) -> None:
        grid = img_size // stride
        super().__init__(PROMPT_WIDTH, (grid, grid), (img_size, img_size), mask_in_chans=16)
        del self.mask_downscaling
        self.point_embeddings[0].requires_grad_(False)

    def forward(
        self, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sparse tokens (N or 1, n, 256) and the dense prompt (N or 1, 256, h, w).

        points: coordinates (N, P, 2) pixels (x, y) and labels (N, P): 1 object, 0 background,
        -1 not a point. boxes (N, 4) pixels (x1, y1, x2, y2). Without prompts N is 1, n is 0.
        """
        with full_precision(self.no_mask_embed.weight.device):
            sparse, dense = super().forward(points, boxes, masks=None)
            # Embeddings a prompt mode leaves unused still get a (zero) gradient, so that
            # DistributedDataParallel waits for the same set of parameters in every mode.
            trained = [*self.point_embeddings[1:], self.not_a_point_embed]
            return sparse, dense + 0.0 * sum(embedding.weight.sum() for embedding in trained)

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        # SAM's own selects rows by boolean masks, which makes the host wait for the device.
        if pad:
            points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
        label = labels.unsqueeze(-1)
        position = self.pe_layer.forward_with_coords(points + 0.5, self.input_image_size)
        embedded = torch.where(label == -1, self.not_a_point_embed.weight, position)
        for kind in (0, 1):
            embedded = embedded + (label == kind) * self.point_embeddings[kind].weight
        return embedded


class TokenDecoder(nn.Module):
    """The parts of both decoders: mask tokens, the two-way transformer, one MLP per token."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(2, PROMPT_WIDTH, num_heads=8, mlp_dim=2048)
        self.iou_token = nn.Embedding(1, PROMPT_WIDTH)  # attended to, though nothing reads it
        self.mask_tokens = nn.Embedding(num_tokens, PROMPT_WIDTH)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(PROMPT_WIDTH, PROMPT_WIDTH, MAP_WIDTH, 3) for _ in range(num_tokens)
        )

    def attend(
        self, embedding: Tensor, position: Tensor, prompts: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Mask tokens (N, T, 256) and image (N, 256, h, w) after the two-way transformer."""
        N, sparse, dense = len(embedding), *prompts
        learned = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([learned.expand(N, -1, -1), sparse.expand(N, -1, -1)], dim=1)
        tokens, image = self.transformer(embedding + dense, position, tokens)
        image = image.transpose(1, 2).reshape(embedding.shape)
        return tokens[:, 1 : len(learned)], image

    def hypernetworks(self, tokens: Tensor) -> Tensor:
        """Map weights (N, T, 32) of mask tokens (N, T, 256), each token by its own MLP.

        The MLPs keep their published names and run as three batched products.
        """
        mlps = self.output_hypernetworks_mlps
        x = tokens.transpose(0, 1)  # (T, N, 256)
        for depth in range(3):
            layers = [mlp.layers[depth] for mlp in mlps]
            weight = torch.stack([layer.weight for layer in layers])
            bias = torch.stack([layer.bias for layer in layers])
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
            x = x if depth == 2 else x.relu()
        return x.transpose(0, 1)


class MaskDecoder(TokenDecoder):
    """Image embedding, prompts and skips -> logits (N, num_classes, H, W), float32.

    The two-way transformer lets 32 mask tokens and the prompts attend to the image; three up
    blocks bring the image to 1/2, where each token weighs its 32 maps; the last block and two
    convolutions follow at full size. An embedding at 1/4 (stride 4) joins the skip of its own
    size first, in place of the two blocks that others need to come there.
    """

    def __init__(self, num_classes: int, stride: int = PATCH) -> None:
        super().__init__(NUM_MASK_TOKENS)
        self.stride = stride
        if stride == 4:
            self.up_join = two_convolutions(PROMPT_WIDTH + SKIP_WIDTHS[2], SKIP_WIDTHS[1])
        else:
            self.up4 = UpBlock(256, 128)
            self.up3 = UpBlock(128, 64)
        self.up2 = UpBlock(64, MAP_WIDTH)
        self.up1 = UpBlock(NUM_MASK_TOKENS, 32)
        self.final_output = nn.Sequential(
            nn.Conv2d(32, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, num_classes, kernel_size=1, bias=False),
        )

    def forward(
        self, embedding: Tensor, position: Tensor, prompts: tuple[Tensor, Tensor], *, skips: list
    ) -> Tensor:
        """Logits of the prompted image.

        embedding (N, 256, h, w); position (1, 256, h, w); prompts: sparse tokens and dense
        prompt of PromptEncoder; skips of DownPath.
        """
        x1, x2, x3, *x4 = skips
        tokens, image = self.attend(embedding, position, prompts)
        if self.stride == 4:
            image = self.up_join(torch.cat([image, x3], dim=1))  # (N, 64, H/4, W/4)
        else:
            image = self.up3(self.up4(image, *x4), x3)
        maps = self.up2(image, x2)  # (N, 32, H/2, W/2)
        weights = self.hypernetworks(tokens)  # (N, 32, 32)
        masks = torch.einsum("nchw,nmc->nhwm", maps, weights).permute(0, 3, 1, 2)  # channels last
        conv, norm, _, last = self.final_output
        return last(conv_norm_relu(conv, norm, self.up1(masks, x1))).float()


class SamMaskDecoder(TokenDecoder):
    """SAM's own mask decoder, one mask token per class: logits (N, num_classes, H, W), float32.

    Token 0, which in SAM gives the one mask, stands for the background, the next for the classes:
    SAMed's order, in which SAM's weights serve up to four classes. Two transposed convolutions
    bring the image to 1/4, where each token weighs its 32 maps; logits are then interpolated to
    full size. SAM's guess of each mask's quality is left out: nothing would train it.
    Source: Kirillov et al. 2023 (SAM); Zhang and Liu 2023 (SAMed).
    """

    def __init__(self, num_classes: int, stride: int = PATCH) -> None:
        super().__init__(num_classes)
        self.stride = stride  # pixels of the image to a cell of the embedding
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(PROMPT_WIDTH, 64, kernel_size=2, stride=2),
            LayerNorm2d(64),
            nn.GELU(),
            nn.ConvTranspose2d(64, MAP_WIDTH, kernel_size=2, stride=2),
            nn.GELU(),
        )

    def forward(
        self, embedding: Tensor, position: Tensor, prompts: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Logits of the prompted image; arguments as `MaskDecoder.forward` takes them."""
        tokens, image = self.attend(embedding, position, prompts)
        maps = self.output_upscaling(image)  # (N, 32, H/4, W/4)
        logits = torch.einsum("nchw,nkc->nkhw", maps, self.hypernetworks(tokens)).float()
        if self.stride == 4:
            return logits
        return F.interpolate(logits, scale_factor=self.stride // 4, mode="bilinear")
