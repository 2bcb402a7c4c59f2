"""nnInteractive's remote protocol v2: the requests of SlicerNNInteractive and napari-nninteractive.

The protocol's arrays are in the order slices, rows, columns (d0, d1, d2); a scan's voxels (i, j, k)
are (d2, d1, d0).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dataset.scans.header import mm_text, size_text
from usam.runtime.processes import say
from usam.serving.http_server import RefusedError, Reply, Request, Route, compute
from usam.serving.leases import Lease, Leases
from usam.serving.marks import Mark, box_mark, lasso_mark, point_mark, scribble_mark
from usam.serving.model import CLICK_SECONDS, Clickable, scan_of_array
from usam.serving.objects import MarkedMask, Region, union
from usam.serving.protocol import (
    CAPABILITIES,
    CLAIM,
    DTYPES,
    HEALTH,
    HEARTBEAT,
    LEASE,
    LEASE_STATUS,
    META,
    RELEASE,
    flag,
    half_open_box,
    pack_array,
    read_json,
    three_numbers,
    unpack_array,
)
from usam.serving.volume_mask import VolumeMask

VERSION = "2.6.0"  # of the client that this was tested with
MAX_IMAGE_BYTES = 4 << 30
MAX_MASK_BYTES = 256 << 20
FINISH_SECONDS = 15.0


class RemoteSession:
    """One client's image and the object that it marks."""

    def __init__(self, model: Clickable, orientation: str) -> None:
        self.model, self.orientation = model, orientation
        self.make: Callable[[], MarkedMask] | None = None
        self.object: MarkedMask | None = None
        self.shape: tuple[int, int, int] = (0, 0, 0)  # (d0, d1, d2)
        self.dtype, self.grows = np.dtype(np.uint8), True
        self.pending: list[Mark] = []
        self._sent: Region | None = None  # what the client's buffer holds

    def set_image(self, array: np.ndarray, spacing: tuple[float, ...]) -> None:
        """Open an image (1, d0, d1, d2)."""
        scan = scan_of_array(array[0], spacing, self.orientation)
        self.make = self.object = None  # the earlier image's memory is free before the next
        self.make = self.model.open_scan(scan)
        self.shape = array.shape[1:]
        self.reset()
        size = f"{size_text(scan.header.shape)} voxels of {mm_text(scan.header.spacing)}"
        say(f"image of {size}, its axes taken as {self.orientation} (--orientation)")

    def reset(self) -> None:
        """The next object."""
        self.opened()
        self.object, self.pending, self._sent = self.make(), [], None
        self.limit()

    def limit(self) -> None:
        """Let windows grow, or not."""
        if isinstance(self.object, VolumeMask):
            self.object.limit_time(CLICK_SECONDS if self.grows else 0.0)

    def opened(self) -> MarkedMask | None:
        """The object; raises ValueError without an image."""
        if self.make is None:
            raise ValueError("no image; send one with set_image first")
        return self.object

    def begin_with(self, mask: np.ndarray) -> None:
        """Start from a mask (d0, d1, d2), which the client has written to its buffer itself."""
        self.opened().begin_with(np.ascontiguousarray(mask.transpose(2, 1, 0) > 0))
        self.pending, self._sent = [], self.object.region

    def mark(self, mark: Mark) -> None:
        """Store a mark for `run`."""
        self.opened().check(mark)
        self.pending.append(mark)

    def run(self) -> bool:
        """Predict from all stored marks; returns whether there were any."""
        pending, self.pending = self.pending, []
        for mark in pending:
            self.object.add(mark)
        return bool(pending)

    def undo(self) -> bool:
        """Undo the last mark."""
        if self.pending:
            self.pending.pop()
            return True
        return self.opened().undo()

    def answer(self, *, ran: bool) -> Reply:
        """What changed since the last answer."""
        region = self.object.region if self.object else None
        part = union(self._sent, region) if ran else None
        changed = ran and region is not self._sent and part is not None
        meta: dict[str, Any] = {"ran_prediction": ran, "bbox": None}
        body = b""
        if changed:
            mask = placed(region, part).transpose(2, 1, 0).astype(self.dtype)
            meta["bbox"] = [[span.start, span.stop] for span in part[::-1]]
            body, self._sent = pack_array(mask), region
        meta |= {"dtype": str(self.dtype), "shape": [hi - lo for lo, hi in meta["bbox"] or []]}
        return Reply(body, {META: _json(meta)})


def placed(region: Region | None, part: tuple[slice, slice, slice]) -> np.ndarray:
    """The mask of a region in `part` of the scan, which holds it."""
    out = np.zeros([span.stop - span.start for span in part], dtype=bool)
    if region is not None:
        own = tuple(
            slice(inner.start - outer.start, inner.stop - outer.start)
            for inner, outer in zip(region.part, part, strict=True)
        )
        out[own] = region.mask
    return out


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


class Remote:
    """Handles the protocol's requests for up to `max_sessions` clients."""

    def __init__(self, model: Clickable, *, max_sessions: int = 1, orientation: str) -> None:
        self.model, self.orientation = model, orientation
        self.leases: Leases[RemoteSession] = Leases(max_sessions)

    def routes(self) -> dict[tuple[str, str], Route]:
        """Request handlers by method and path."""
        leased = {
            "/set_image": (self.set_image, MAX_IMAGE_BYTES),
            "/set_target_buffer": (set_target_buffer, None),
            "/set_do_autozoom": (set_do_autozoom, None),
            "/reset_interactions": (reset_interactions, None),
            "/add_point_interaction": (add_point, None),
            "/add_bbox_interaction": (add_box, None),
            "/add_scribble_interaction": (add_scribble, MAX_MASK_BYTES),
            "/add_lasso_interaction": (add_lasso, MAX_MASK_BYTES),
            "/add_initial_seg_interaction": (add_initial_seg, MAX_MASK_BYTES),
            "/predict": (predict, None),
            "/undo": (undo, None),
        }
        routes = {
            ("GET", HEALTH): Route(lambda _: Reply({"ok": True}), needs_key=False),
            ("GET", CAPABILITIES): Route(self.capabilities),
            ("POST", CLAIM): Route(self.claim),
            ("POST", RELEASE): Route(self.release),
            ("POST", HEARTBEAT): Route(self.heartbeat),
            ("GET", LEASE_STATUS): Route(self.heartbeat),
        }
        for path, (function, limit) in leased.items():
            answer = self._leased(function)
            routes["POST", path] = Route(answer, limit) if limit else Route(answer)
        return routes

    def _leased(self, function: Callable[[RemoteSession, Request], Reply]) -> Any:
        """A request of a lease: one after the other, and one at a time with the model."""

        def answer(request: Request) -> Reply:
            lease = self._lease(request)
            with lease.lock, compute:
                reply = function(lease.content, request)
            lease.used = self.leases.clock()
            return reply

        return answer

    def _lease(self, request: Request, *, is_use: bool = True) -> Lease[RemoteSession]:
        return self.leases.find(request.headers.get(LEASE), is_use=is_use)

    def claim(self, _: Request) -> Reply:
        """A lease for a new client."""
        lease = self.leases.claim(lambda: RemoteSession(self.model, self.orientation))
        return Reply({
            "lease_token": lease.token,
            "idle_timeout_seconds": self.leases.idle,
            "liveness_timeout_seconds": self.leases.silent,
            "max_sessions": self.leases.number,
        })  # fmt: skip

    def release(self, request: Request) -> Reply:
        """End a lease; it is no error if it has ended already."""
        self.leases.release(request.headers.get(LEASE))
        return Reply({"released": True})

    def heartbeat(self, request: Request) -> Reply:
        """The time left to a lease; asking does not extend it."""
        lease = self._lease(request, is_use=False)
        return Reply({
            "remaining_seconds": self.leases.remaining(lease),
            "idle_timeout_seconds": self.leases.idle,
        })  # fmt: skip

    def capabilities(self, _: Request) -> Reply:
        """The prompts that the model supports."""
        points, boxes, volume = self.model.points, self.model.boxes, self.model.is_volumetric
        return Reply({
            "supported_interactions": {
                "points": points, "bbox2d": boxes, "bbox3d": boxes and volume, "scribble": points,
                "lasso": points,
            },
            "channel_mapping": {
                "prev_seg": 0, "bbox": [1, 2], "lasso": [1, 2], "point": [3, 4], "scribble": [5, 6],
            },
            "num_interaction_channels": 7,
            "supports_initial_label": True,
            "supports_zero_shot_label_refinement": volume,
            "preferred_scribble_thickness": [2, 2, 2],
            "interaction_decay": None,
            "inference_session_version": VERSION,
            "supports_undo": True,
            "do_autozoom": True,
            "license": f"{self.model.name}; the license is that of its weights",
        })  # fmt: skip

    def set_image(self, session: RemoteSession, request: Request) -> Reply:
        """Set a new image; the earlier one and its object are dropped."""
        properties = _meta(request).get("image_properties")
        spacing = properties.get("spacing") if isinstance(properties, dict) else None
        sizes = three_numbers(spacing, "image_properties.spacing")
        array = unpack_array(request.body, (None, None, None, None))
        if array.shape[0] != 1:
            raise ValueError(f"an image of {array.shape[0]} channels; this model takes 1")
        session.set_image(array, sizes)
        return Reply({"original_image_shape": list(array.shape)})


def set_target_buffer(session: RemoteSession, request: Request) -> Reply:
    """Set the shape and type of the buffer that the client writes masks to; drops all objects."""
    content = read_json(request.body)
    session.opened()
    if content.get("shape") != list(session.shape):
        raise ValueError(
            f"a buffer of {str(content.get('shape'))[:60]}; the image has {list(session.shape)}"
        )
    if content.get("dtype") not in DTYPES:
        raise ValueError(f"a buffer of dtype {content.get('dtype')!r:.40} is not supported")
    session.dtype = np.dtype(content["dtype"])
    session.reset()
    return Reply()


def set_do_autozoom(session: RemoteSession, request: Request) -> Reply:
    """Whether windows grow along the object."""
    session.grows = flag(read_json(request.body), "do_autozoom", True)
    session.limit()
    return Reply()


def reset_interactions(session: RemoteSession, request: Request) -> Reply:
    """Start the next object; does nothing without an image."""
    if session.make is not None:
        session.reset()
    return Reply()


def add_point(session: RemoteSession, request: Request) -> Reply:
    """A click."""
    content = read_json(request.body)
    place = three_numbers(content.get("coordinates"), "coordinates")
    voxel = tuple(int(np.floor(value + 0.5)) for value in place[::-1])
    return _marked(session, content, lambda inside: point_mark(voxel, inside=inside))


def add_box(session: RemoteSession, request: Request) -> Reply:
    """A box; its upper bounds are exclusive."""
    content = read_json(request.body)
    session.opened()
    spans = half_open_box(content.get("bbox_coords"), "bbox_coords", session.shape)[::-1]
    low, high = tuple(a for a, _ in spans), tuple(b - 1 for _, b in spans)
    return _marked(session, content, lambda inside: box_mark(low, high, inside=inside))


def add_scribble(session: RemoteSession, request: Request) -> Reply:
    """A painted line."""
    return _painted(session, request, scribble_mark)


def add_lasso(session: RemoteSession, request: Request) -> Reply:
    """A closed outline, filled or not."""
    return _painted(session, request, lasso_mark)


def _painted(session: RemoteSession, request: Request, make: Callable[..., Mark]) -> Reply:
    content = _meta(request)
    session.opened()
    box = content.get("interaction_bbox")
    spans = [(0, size) for size in session.shape]
    if box is not None:
        spans = half_open_box(box, "interaction_bbox", session.shape)
        if [list(span) for span in spans] != box:
            raise ValueError(f"interaction_bbox: {box} lies outside the image")
    painted = unpack_array(request.body, tuple(high - low for low, high in spans)) > 0
    first = tuple(low for low, _ in spans[::-1])
    turned = painted.transpose(2, 1, 0)
    return _marked(session, content, lambda inside: make(turned, first, inside=inside))


def _marked(
    session: RemoteSession, content: Mapping[str, Any], make: Callable[[bool], Mark]
) -> Reply:
    inside = flag(content, "include_interaction", True)
    runs = flag(content, "run_prediction", True)
    session.mark(make(inside))
    return session.answer(ran=session.run() if runs else False)


def add_initial_seg(session: RemoteSession, request: Request) -> Reply:
    """A mask to start from, refined at once if wanted."""
    content = _meta(request)
    session.opened()
    runs = flag(content, "run_prediction", False)
    session.begin_with(unpack_array(request.body, session.shape))
    return session.answer(ran=session.object.finish(FINISH_SECONDS) if runs else False)


def predict(session: RemoteSession, request: Request) -> Reply:
    """Predict from marks not yet used; if there are none, extend by more windows or slices."""
    flag(read_json(request.body), "force_full_refine", False)
    session.opened()
    ran = session.run() or session.object.finish(FINISH_SECONDS)
    return session.answer(ran=ran)


def undo(session: RemoteSession, request: Request) -> Reply:
    """Undo the last mark."""
    return session.answer(ran=session.undo())


def _meta(request: Request) -> dict[str, Any]:
    text = request.headers.get(META)
    if text is None:
        raise RefusedError(400, f"the header {META} is missing")
    return read_json(text)
