"""Averages predictions of several models and of rotated and flipped views of an image.

u-sam.py puts it in a model's place for --resume A B C and --tta; engine and predict see no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usam.cli.choices import TTA

View = tuple[int, bool]  # quarter turns after a mirroring of left and right, if any
VIEWS: dict[str, tuple[View, ...]] = {
    "none": ((0, False),),
    "flip": ((0, False), (0, True), (2, True), (2, False)),  # as is, x, y, x and y
    "flip+rot": tuple((turns, mirrored) for turns in range(4) for mirrored in (False, True)),
}
assert tuple(VIEWS)[1:] == TTA


class Averaged(nn.Module):
    """A model that averages the class probabilities of several models over all views.

    members: (model, whether it wants points as (row, column)); all see images of one size. tta: a
    key of VIEWS. Gives log probabilities (N, C, H, W) in place of logits, float32. Prompts are
    turned and flipped with the image. mirrored_ids: the id of each class in a mirrored
    patient, None if none has a side. Models run one after the other, and so do views.
    """

    def __init__(
        self,
        members: Sequence[tuple[nn.Module, bool]],
        tta: str = "none",
        mirrored_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.mirrored_ids = None if mirrored_ids is None else list(mirrored_ids)
        self.models = nn.ModuleList(model for model, _ in members)
        self.row_col = [row_col for _, row_col in members]
        self.views = VIEWS[tta]

    @property
    def num_classes(self) -> int:
        """Classes of every member, background included."""
        return self.models[0].num_classes

    def forward(
        self,
        image: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Log probabilities; arguments as those of a single model, points as (x, y)."""
        total: Tensor | float = 0.0
        for view in self.views:
            given = turned_prompts(points, boxes, view, image.shape[-1])
            seen = turned(image, view)
            for model, row_col in zip(self.models, self.row_col, strict=True):
                prompts = dict(given)
                if row_col and points is not None:
                    coords, labels = given["points"]
                    prompts["points"] = (coords.flip(-1), labels)
                probability = model(seen, **prompts).float().softmax(dim=1)
                if view[1] and self.mirrored_ids is not None:  # left is right in a mirrored patient
                    probability = probability[:, self.mirrored_ids]
                total = total + turned_back(probability, view)
        mean = total / (len(self.views) * len(self.models))
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


def turned(image: Tensor, view: View) -> Tensor:
    """The view of images (N, C, S, S)."""
    turns, mirrored = view
    return torch.rot90(image.flip(-1) if mirrored else image, turns, (-2, -1))


def turned_back(image: Tensor, view: View) -> Tensor:
    """The images that `turned` was given, from their view."""
    turns, mirrored = view
    upright = torch.rot90(image, -turns, (-2, -1))
    return upright.flip(-1) if mirrored else upright


def turned_prompts(
    points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, view: View, side: int
) -> dict[str, Any]:
    """Points ((N, P, 2) pixels (x, y), labels) and boxes (N, 4) in the view's coordinates.

    Pixel 0 becomes pixel side - 1; a box keeps its corners in order.
    """
    if points is not None:
        points = (_turned_coords(points[0], view, side), points[1])
    if boxes is not None:
        corners = _turned_coords(boxes.view(-1, 2, 2), view, side)
        boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1).clamp(0, side)
    return {"points": points, "boxes": boxes}


def _turned_coords(coords: Tensor, view: View, side: int) -> Tensor:
    x, y = coords.unbind(dim=-1)
    turns, mirrored = view
    if mirrored:
        x = side - 1 - x
    for _ in range(turns):
        x, y = y, side - 1 - x
    return torch.stack([x, y], dim=-1)
