"""Segments one object of a volume from clicks, in windows around them and beyond as needed."""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from dataset.crops import crop_at, normalise, overlap
from usam.models.sam_med3d import THRESHOLD, SamMed3d
from usam.runtime.precision import Precision

Voxel = tuple[int, int, int]

MAX_WINDOWS = 64  # grown for one object; then growth stops, and `stopped_early` is set
OUTSIDE = -30.0  # logit where no window has looked
KNOWN = 8.0  # logit, and its negative, of a mask that is given as known
COVERED = 0.25  # weight of other windows' answers from which a place counts as looked at
MAX_CACHE_BYTES = 512 << 20  # of embeddings; one of ViT-B takes 0.8 MB
GRID = 16  # windows begin at multiples of side / GRID voxels from the first, so that they recur


@dataclass
class Window:
    """A cube of the volume from voxel `origin`; `logits` (1, 1, s, s, s) is its last prediction.

    `hint` is a click the growing itself makes: (voxel, label).
    """

    origin: Voxel
    embedding: Tensor
    logits: Tensor
    hint: tuple[Voxel, int] | None = None


class EmbeddingCache:
    """Embeddings of windows of one volume, each computed once while there is memory for it.

    image (X, Y, Z) at 1.5 mm; windows are cut and scaled as in training. Beyond `max_bytes` of
    embeddings the ones not used for the longest time are dropped.
    """

    def __init__(
        self,
        model: SamMed3d,
        image: np.ndarray,
        precision: Precision,
        max_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        self.model, self.image, self.precision = model, image, precision
        self.shape: Voxel = tuple(image.shape)
        self.max_bytes, self._num_bytes = max_bytes, 0
        self._known: OrderedDict[Voxel, Tensor] = OrderedDict()

    @property
    def takes_boxes(self) -> bool:
        """Whether the model was trained with boxes."""
        return self.model.config["num_point_embeddings"] == 4

    def embedding(self, origin: Voxel) -> Tensor:
        """(1, 384, g, g, g) of the window at `origin`."""
        if origin in self._known:
            self._known.move_to_end(origin)
            return self._known[origin]
        crop = torch.from_numpy(crop_at(self.image, origin, self.model.side))[None, None]
        with torch.inference_mode(), self.precision.autocast():
            embedding = self.model.image_encoder(normalise(crop).to(self.precision.device))
        self._known[origin] = embedding
        self._num_bytes += embedding.nbytes
        while self._num_bytes > self.max_bytes and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        return embedding


class Session:
    """Interactive segmentation of one object; after each click `logits` covers the whole volume.

    As in training, each click adds to those before, and its window sees its own last answer as a
    mask. The windows of clicks are kept. After each click others grow from them: where the object
    touches a face of a window inside the volume, another window is centred there and gets a click
    in the middle of the part that is seen, as in a first round of training. Half a mask from the
    overlap, which no training shows, made answers worse.
    Overlapping answers are averaged, each with a weight that falls towards its faces.
    """

    def __init__(
        self, cache: EmbeddingCache, known: Tensor | None = None, max_seconds: float = math.inf
    ) -> None:
        """known (X, Y, Z) bool: a mask to refine, if there is one.

        max_seconds: no further window is opened so long after a click; `grow` opens the rest.
        """
        self.cache, self.side, self.max_seconds = cache, cache.model.side, max_seconds
        self.num_grown, self.stopped_early = 0, False
        self._windows: list[Window] = []
        self._clicks: list[tuple[Voxel, int]] = []
        self._box: tuple[Voxel, Voxel] | None = None
        device = cache.precision.device
        self._known = None if known is None else (2 * known.to(device).float() - 1) * KNOWN
        self._sum = torch.zeros(cache.shape, device=device)
        self._weight = torch.zeros(cache.shape, device=device)
        self._falling = window_weight(self.side, device)

    @property
    def has_mask(self) -> bool:
        """Whether it refines a given mask."""
        return self._known is not None

    @property
    def num_windows(self) -> int:
        """Windows that the prediction is made of."""
        return len(self._windows) + self.num_grown

    @property
    def logits(self) -> Tensor:
        """(X, Y, Z) float32; outside all windows, the given mask or a value far below 0."""
        return self._logits_in((...,))

    def look(self, origin: Voxel) -> None:
        """Open a window at `origin` and predict without a click, from the given mask alone."""
        self._windows.append(self._open(origin))
        if self._known is not None:
            self._answer(self._windows[-1])
            self.grow(self.max_seconds)

    def click(
        self,
        voxel: Voxel,
        label: int,
        box: tuple[Voxel, Voxel] | None = None,
        *,
        is_last: bool = True,
    ) -> None:
        """Add a click, label 1 in the object and 0 outside, and predict.

        box: first and last corner of a box around the object, for a model that takes boxes.
        is_last: False where another click follows at once; only the last one's answer grows.
        """
        voxel = tuple(int(index) for index in voxel)
        self._clicks.append((voxel, int(label)))
        self._box = box or self._box
        windows = [window for window in self._windows if self._holds(window, voxel)]
        if not windows:
            windows = [self._open(centred(voxel, self.side))]
            self._windows += windows
        for window in windows:
            self._answer(window)
        if is_last:
            self.grow(self.max_seconds)

    def state(self) -> tuple:
        """The state after the clicks so far, for `restore`."""
        answers = [(window, window.logits) for window in self._windows]
        return answers, list(self._clicks), self._box, self.stopped_early

    def restore(self, state: tuple, *, answer: bool = True) -> None:
        """Return to an earlier `state`.

        answer: False where `logits` are not wanted before the next click.
        """
        answers, clicks, self._box, self.stopped_early = state
        self._windows, self._clicks = [], list(clicks)
        for window, logits in answers:
            window.logits = logits
            self._windows.append(window)
        if answer:
            self.grow(self.max_seconds)

    def _logits_in(self, part: tuple) -> Tensor:
        """`logits` of a part of the volume."""
        total, weight = self._sum[part], self._weight[part]
        rest = torch.full_like(total, OUTSIDE) if self._known is None else self._known[part]
        return torch.where(weight > 0, total / weight.clamp(min=1e-6), rest)

    def _open(self, origin: Voxel) -> Window:
        """A new window; its mask is the part of the given one inside it, or 0."""
        origin = tuple(int(index) for index in origin)
        low = 3 * (self.side // 4,)
        mask = torch.zeros(1, 1, *low, device=self._sum.device)
        if self._known is not None:
            inside, own = overlap(origin, self.side, self.cache.shape)
            full = torch.full(3 * (self.side,), -KNOWN, device=mask.device)
            full[own] = self._known[inside]
            mask = F.adaptive_avg_pool3d(full[None, None], low)
        return Window(origin, self.cache.embedding(origin), mask)

    def _holds(self, window: Window, voxel: Voxel) -> bool:
        pairs = zip(window.origin, voxel, strict=True)
        return all(low <= index < low + self.side for low, index in pairs)

    def _answer(self, window: Window) -> None:
        """Decode the clicks that lie in the window, starting from its last prediction."""
        clicks = [click for click in self._clicks if self._holds(window, click[0])]
        clicks += [window.hint] if window.hint else []
        device, origin = self._sum.device, torch.tensor(window.origin)
        points = boxes = None
        if clicks:
            coords = torch.tensor([voxel for voxel, _ in clicks]) - origin
            labels = torch.tensor([label for _, label in clicks])
            points = coords.float()[None].to(device), labels[None].to(device)
        if self._box and window.hint is None:
            corners = (torch.tensor(self._box) - origin).clamp(0, self.side - 1)
            boxes = corners.float()[None].to(device)
        model, precision = self.cache.model, self.cache.precision
        with torch.inference_mode(), precision.autocast():
            answer = model.decode(window.embedding, points, window.logits, boxes=boxes)
        if not bool(answer.isfinite().all()):
            raise ValueError(
                f"the model's output is not finite in the window at voxel {window.origin} of the "
                "1.5 mm volume; check the checkpoint, or use --amp off"
            )
        window.logits = answer.float()

    def grow(self, max_seconds: float = math.inf) -> None:
        """Predict in the windows of clicks and all that grow from them, for up to `max_seconds`."""
        deadline = time.monotonic() + max_seconds
        self._sum.zero_()
        self._weight.zero_()
        self.stopped_early = False
        for window in self._windows:
            self._add(window)
        windows, waiting = list(self._windows), deque(self._windows)
        while waiting:
            touch = self._goes_on(waiting[0])
            if touch is None:
                waiting.popleft()
                continue
            num_grown = len(windows) - len(self._windows)
            if num_grown >= MAX_WINDOWS or time.monotonic() >= deadline:
                self.stopped_early = True
                break
            grown = self._open(self._on_grid(centred(touch, self.side)))
            grown.hint = touch, 1
            self._answer(grown)
            self._add(grown)
            windows.append(grown)
            waiting.append(grown)
        self.num_grown = len(windows) - len(self._windows)

    def _add(self, window: Window) -> None:
        """Blend a window's logits into the volume's."""
        answer = self.cache.model.upscale(window.logits)[0, 0]
        inside, own = overlap(window.origin, self.side, self.cache.shape)
        self._sum[inside] += (answer * self._falling)[own]
        self._weight[inside] += self._falling[own]

    def _on_grid(self, origin: Voxel) -> Voxel:
        """`origin` moved to the nearest point of the grid that starts at the first window."""
        step, first = max(self.side // GRID, 1), self._windows[0].origin
        pairs = zip(origin, first, strict=True)
        return tuple(low + round((index - low) / step) * step for index, low in pairs)

    def _started(self, window: Window, part: Tensor, inside: tuple[slice, ...]) -> Tensor:
        """The components of `part`, a window's prediction, that contain a click or touch the mask.

        Only these may go on in other windows: false finds elsewhere would grow without end.
        """
        pieces, _ = ndimage.label(part.cpu().numpy())
        marks = [voxel for voxel, label in self._clicks if label and self._holds(window, voxel)]
        marks += [window.hint[0]] if window.hint else []
        starts = [span.start for span in inside]
        kept = {
            pieces[tuple(i - low for i, low in zip(mark, starts, strict=True))] for mark in marks
        }
        if self._known is not None:
            kept |= set(np.unique(pieces[self._known[inside].cpu().numpy() > 0]))
        return torch.from_numpy(np.isin(pieces, list(kept - {0}))).to(part.device)

    def _goes_on(self, window: Window) -> Voxel | None:
        """A voxel where the object may continue beyond the window, unseen by others; else None."""
        inside, _ = overlap(window.origin, self.side, self.cache.shape)
        part = self._started(window, self._logits_in(inside) > THRESHOLD, inside)
        smallest = max(self.side // 32, 1) ** 2  # voxels; fewer are noise
        for axis, (span, size) in enumerate(zip(inside, self.cache.shape, strict=True)):
            for outwards, index in ((-1, span.start), (1, span.stop - 1)):
                if not 0 <= index + outwards < size:
                    continue
                behind = list(inside)
                behind[axis] = index + outwards
                unseen = self._weight[tuple(behind)] < COVERED
                plane = part.select(axis, index - span.start) & unseen
                for place in deepest_of_pieces(plane.cpu().numpy(), smallest):
                    starts = [other.start for n, other in enumerate(inside) if n != axis]
                    voxel = [low + pixel for low, pixel in zip(starts, place, strict=True)]
                    voxel.insert(axis, index)
                    return tuple(voxel)
        return None


def deepest_of_pieces(plane: np.ndarray, smallest: int) -> list[tuple[int, int]]:
    """The pixel deepest inside each connected piece of `plane` (H, W) bool, largest piece first.

    Pieces of fewer than `smallest` pixels are left out.
    """
    pieces, number = ndimage.label(plane)
    if not number:
        return []
    sizes = np.bincount(pieces.ravel(), minlength=number + 1)
    sizes[0] = 0
    depth = ndimage.distance_transform_edt(np.pad(plane, 1))[1:-1, 1:-1]
    order = [piece for piece in np.argsort(-sizes, kind="stable") if sizes[piece] >= smallest]
    places = ndimage.maximum_position(depth, pieces, order)
    return [tuple(int(index) for index in place) for place in places]


def window_weight(side: int, device: torch.device) -> Tensor:
    """(S, S, S) weight of a window's logits, 1 in the middle half, falling towards its faces."""
    index = torch.arange(side, device=device)
    line = (torch.minimum(index, side - 1 - index) + 1) / (side // 4)
    line = line.clamp(max=1)
    return torch.minimum(torch.minimum(line[:, None, None], line[:, None]), line)


def centred(voxel: Voxel, side: int) -> Voxel:
    """The origin of a window around `voxel`."""
    return tuple(int(index) - side // 2 for index in voxel)
