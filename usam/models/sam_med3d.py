"""SAM-Med3D: a volume is encoded once, then segmented from clicks and a previous mask.

u-sam.py builds it with `build_sam_med3d`; the names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from usam.cli.choices import REL_POS, SAM_MED3D_MODELS
from usam.models.full_precision import full_precision
from usam.models.prompts import next_clicks
from usam.models.sam_med3d_encoder import ImageEncoder3d, LayerNorm3d
from usam.models.two_way import meet_at_positions

PATCH = 16
PROMPT_DIM = 384
ROUNDS = 11
THRESHOLD = 0.0  # logit above which a voxel is in the object: probability 0.5, in training,
# validation and prediction; the published code trains with it and predicts with logit 0.5


class Size(NamedTuple):
    """Sizes of one registered model; side is in voxels and global_blocks counts from 0."""

    dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    side: int


SAM_MED3D_SIZES = {
    "vit_b_ori": Size(768, 12, 12, (2, 5, 8, 11), 128),  # the published weights
    "vit_b": Size(384, 12, 12, (2, 5, 8, 11), 256),
    "vit_l": Size(1024, 24, 16, (5, 11, 17, 23), 256),
    "vit_h": Size(1280, 32, 16, (7, 15, 23, 31), 256),
    "vit_tiny": Size(96, 4, 3, (1, 3), 64),  # ours, for tests and the phantom
}
assert tuple(SAM_MED3D_SIZES) == SAM_MED3D_MODELS


class FourierEncoding(nn.Module):
    """Random Fourier features of positions: cat[sin, cos, sin] of 2 pi (2c - 1) G.

    Source: Tancik et al. 2020; G (3, dim / 3) is drawn once, with a standard deviation of
    `scale`, and kept in the state dict.
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        matrix = scale * torch.randn(3, dim // 3)
        self.register_buffer("positional_encoding_gaussian_matrix", matrix)

    def forward(self, position: Tensor) -> Tensor:
        """position (..., 3) in [0, 1] -> (..., dim), float32 also under autocast."""
        matrix = self.positional_encoding_gaussian_matrix
        with full_precision(matrix.device):
            phase = 2 * math.pi * ((2 * position.to(matrix.dtype) - 1) @ matrix)
            return torch.cat([phase.sin(), phase.cos(), phase.sin()], dim=-1)

    def grid(self, size: int, *, swapped: bool = True) -> Tensor:
        """Encoding (1, dim, size, size, size) of a grid's centres.

        The published code swaps the first two axes here and not for clicks: the entry (i, j, k)
        encodes (j, i, k). The weights were trained so; it keeps a click's encoding from meeting
        that of its place.
        """
        matrix = self.positional_encoding_gaussian_matrix
        centre = (torch.arange(size, device=matrix.device, dtype=matrix.dtype) + 0.5) / size
        i, j, k = torch.meshgrid(centre, centre, centre, indexing="ij")
        position = [j, i, k] if swapped else [i, j, k]
        return self(torch.stack(position, dim=-1)).permute(3, 0, 1, 2)[None]


class PromptEncoder3d(nn.Module):
    """Clicks, boxes and a previous mask as embeddings of `dim` channels."""

    def __init__(self, *, side: int, dim: int, num_point_embeddings: int) -> None:
        super().__init__()
        self.side, self.grid = side, side // PATCH
        # Of a grid of 8 cells a side, as published, a click's encoding resembles its cell's. With
        # fewer cells it would not, and clicks would be ignored, unless waves grow as cells do.
        self.pe_layer = FourierEncoding(dim, scale=min(self.grid / 8, 1.0))
        # 0 negative click, 1 positive click, then a box's two corners
        self.point_embeddings = nn.ModuleList(
            nn.Embedding(1, dim) for _ in range(num_point_embeddings)
        )
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, 4, kernel_size=2, stride=2),
            LayerNorm3d(4),
            nn.GELU(),
            nn.Conv3d(4, 16, kernel_size=2, stride=2),
            LayerNorm3d(16),
            nn.GELU(),
            nn.Conv3d(16, dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def sparse(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None) -> Tensor | None:
        """One token per click, two per box; clicks without a box are followed by a padding token.

        points (coords (N, P, 3) voxels, labels (N, P)), boxes (N, 2, 3) voxels: first and last
        corner. Returns (N, tokens, dim), or None without either.
        """
        tokens = []
        if points is not None:
            tokens.append(self.clicks(*points))
            if boxes is None:
                padding = self.not_a_point_embed.weight[None].expand(len(points[0]), -1, -1)
                tokens.append(padding)
        if boxes is not None:
            if len(self.point_embeddings) < 4:
                raise ValueError(
                    "boxes need a model with 4 point embeddings, this one has 2; click the centre"
                )
            corners = torch.cat([self.point_embeddings[index].weight for index in (2, 3)])
            tokens.append(self.pe_layer((boxes + 0.5) / self.side) + corners)
        return torch.cat(tokens, dim=1) if tokens else None

    def clicks(self, coords: Tensor, labels: Tensor) -> Tensor:
        """(N, P, 3) voxels and (N, P) labels 0, 1 or -1 (not a point) -> (N, P, dim)."""
        labels = labels[..., None]
        position = self.pe_layer((coords + 0.5) / self.side)
        negative, positive = (embedding.weight for embedding in self.point_embeddings[:2])
        click = position + torch.where(labels == 1, positive, negative)
        # All three are in the graph whatever the labels, so DDP's gradients never differ in kind.
        return torch.where(labels == -1, self.not_a_point_embed.weight, click)

    def dense(self, mask: Tensor | None) -> Tensor:
        """Low-res logits (N, 1, side/4, side/4, side/4) or None -> (N or 1, dim, g, g, g)."""
        if mask is not None:
            return self.mask_downscaling(mask)
        return self.no_mask_embed.weight[..., None, None, None].expand(-1, -1, *3 * [self.grid])


class MaskDecoder3d(nn.Module):
    """SAM's two-way transformer over voxels; only the first of its four masks is ever used."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=8, mlp_dim=2048)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(4, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm3d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose3d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, dim // 8, num_layers=3) for _ in range(4)
        )
        self.iou_prediction_head = MLP(dim, 256, 4, num_layers=3)

    def forward(self, source: Tensor, position: Tensor, sparse: Tensor | None) -> Tensor:
        """source (N, C, g, g, g), its position encoding and sparse (N, T, C) or None.

        Returns logits (N, 1, 4g, 4g, 4g).
        """
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = tokens.expand(len(source), -1, -1)
        if sparse is not None:
            tokens = torch.cat([tokens, sparse.to(tokens.dtype)], dim=1)
        # The transformer flattens what follows the channels; it wants two axes there.
        tokens, voxels = self.transformer(source.flatten(3), position.flatten(3), tokens)
        voxels = voxels.transpose(1, 2).unflatten(2, source.shape[2:])
        weights = self.output_hypernetworks_mlps[0](tokens[:, 1])
        return torch.einsum("nc,ncdhw->ndhw", weights, self.output_upscaling(voxels))[:, None]


class SamMed3d(nn.Module):
    """Volumetric SAM with published names; see `forward` (training) and `decode` (one answer).

    `side` is the voxels along each axis of a volume, `config` what `build_sam_med3d` was given.
    """

    def __init__(self, size: Size, *, config: dict[str, Any]) -> None:
        super().__init__()
        self.side, self.config = size.side, dict(config)
        self.image_encoder = ImageEncoder3d(
            side=size.side,
            dim=size.dim,
            depth=size.depth,
            num_heads=size.num_heads,
            global_blocks=size.global_blocks,
            out_dim=PROMPT_DIM,
            rel_pos=config["rel_pos"],
            patch=PATCH,
        )
        self.prompt_encoder = PromptEncoder3d(
            side=size.side, dim=PROMPT_DIM, num_point_embeddings=config["num_point_embeddings"]
        )
        self.mask_decoder = MaskDecoder3d(PROMPT_DIM)
        self.freeze_untrained()

    def freeze_untrained(self) -> None:
        """Freeze what gets no gradient from the click rounds, as in published training.

        These are the IoU head, the other masks' hypernetworks, the embedding of no mask (a round
        always has one) and a box's corners. All else gets a gradient in every step, on every rank.
        """
        for module in (
            self.mask_decoder.iou_prediction_head,
            self.mask_decoder.output_hypernetworks_mlps[1:],
            self.prompt_encoder.no_mask_embed,
            self.prompt_encoder.point_embeddings[2:],
        ):
            module.requires_grad_(False)

    def decode(
        self,
        embedding: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        *,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Low-res logits (N, 1, side/4, side/4, side/4) for prompts on encoded volumes.

        embedding (N or 1, 384, g, g, g) from `image_encoder`; points (coords (N, P, 3) voxel
        indices in array order, labels (N, P): 1 object, 0 background, -1 ignored); mask the
        previous low-res logits; boxes (N, 2, 3) voxel indices of the first and last corner.
        Raises ValueError for boxes where the model has no embeddings for them.
        """
        sparse = self.prompt_encoder.sparse(points, boxes)
        source = embedding + self.prompt_encoder.dense(mask)
        if sparse is not None and len(source) == 1:
            source = source.expand(len(sparse), -1, -1, -1, -1)
        swapped = self.config["rel_pos"] == "published"
        position = self.prompt_encoder.pe_layer.grid(self.side // PATCH, swapped=swapped)
        return self.mask_decoder(source, position, sparse)

    def upscale(self, logits: Tensor) -> Tensor:
        """Low-res logits (N, C, ...) -> (N, C, side, side, side), trilinear."""
        return F.interpolate(logits, size=3 * (self.side,), mode="trilinear", align_corners=False)

    def forward(
        self,
        volume: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        *,
        num_rounds: int = ROUNDS,
    ) -> Tensor:
        """Rounds of simulated clicks: low-res logits (N, num_rounds, side/4, side/4, side/4).

        volume (N, 1, side, side, side) float; mask (N, [1,] side, side, side), object above 0;
        generator (CPU) draws the clicks and the round without one. A round adds one click, drawn
        from the errors of the round before, to those already made, and sees its logits as a mask;
        one round of 2..8 and the last see the mask alone. Gradients flow through the mask from
        round to round as in published training: the graph is held anyway, and a round learns to
        leave a mask that the next can use. Clicks accumulate, as in prediction; the published
        default forgot them.
        """
        embedding = self.image_encoder(volume)
        quiet = rounds_without_click(num_rounds, generator)
        logits = embedding.new_zeros(len(volume), 1, *3 * [self.side // 4], dtype=torch.float32)
        coords, labels, answers = [], [], []
        for index in range(num_rounds):
            points = None
            if index not in quiet:
                with torch.no_grad():
                    click = next_clicks(self.upscale(logits.float()), mask, generator)
                coords.append(click[0])
                labels.append(click[1])
                points = torch.cat(coords, dim=1), torch.cat(labels, dim=1)
            logits = self.decode(embedding, points, logits)
            answers.append(logits)
        return torch.cat(answers, dim=1)

    def parameter_groups(self, lr_vit: float, lr: float | None = None) -> list[dict[str, Any]]:
        """AdamW groups of the trained parameters: encoder at lr_vit, prompts and decoder at lr.

        Without lr the latter are trained at a tenth of lr_vit, as published.
        """
        lr = 0.1 * lr_vit if lr is None else lr
        modules = {"image_encoder": lr_vit, "prompt_encoder": lr, "mask_decoder": lr}
        return [
            {
                "params": [p for p in self.get_submodule(name).parameters() if p.requires_grad],
                "lr": rate,
            }
            for name, rate in modules.items()
        ]


def rounds_without_click(num_rounds: int, generator: torch.Generator) -> set[int]:
    """Rounds, counted from 0, that see the previous mask only: one of 2..8 and the last.

    The first always has its click. Fewer than 4 rounds have no random one.
    """
    last = num_rounds - 1
    if last < 3:
        return {last} - {0}
    return {int(torch.randint(2, min(9, last), (), generator=generator)), last}


def build_sam_med3d(
    sam_model: str = "vit_b_ori", rel_pos: str = "published", num_point_embeddings: int = 2
) -> SamMed3d:
    """A randomly initialised SAM-Med3D; `vit_b_ori` has the published names and shapes.

    rel_pos "published" reads relative positions and the decoder's axes as the published code
    does, which its weights need; "corrected" reads both as intended, for training from scratch,
    where clicks then find their places far sooner. num_point_embeddings is 2
    (clicks) or 4 (clicks and a box's corners), as in the checkpoint. Raises ValueError for others.
    """
    if sam_model not in SAM_MED3D_MODELS:
        known = ", ".join(SAM_MED3D_MODELS)
        raise ValueError(f"sam_model: wanted one of {known}, found {sam_model!r}")
    if rel_pos not in REL_POS:
        raise ValueError(f"rel_pos: wanted one of {', '.join(REL_POS)}, found {rel_pos!r}")
    if num_point_embeddings not in (2, 4):
        raise ValueError(f"num_point_embeddings: wanted 2 or 4, found {num_point_embeddings}")
    config = {
        "sam_model": sam_model,
        "rel_pos": rel_pos,
        "num_point_embeddings": num_point_embeddings,
    }
    model = SamMed3d(SAM_MED3D_SIZES[sam_model], config=config)
    if rel_pos == "corrected":
        meet_at_positions(model.mask_decoder.transformer)
    return model
