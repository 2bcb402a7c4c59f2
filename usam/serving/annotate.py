"""--annotate: a browser page that displays scans, takes clicks and saves the segmentations.

The page's voxels are (x, y, z) of the scan turned to LPS: x to the left, y to the back, z up.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dataset.files import write_json
from dataset.scans.orientation import turn_to_lps
from dataset.scans.window import WINDOWS, window_limits
from dataset.text import counted
from usam.runtime.processes import say
from usam.serving.http_server import RefusedError, Reply, Request, Route, compute
from usam.serving.marks import Mark, Part, box_mark, point_mark
from usam.serving.model import Clickable, scan_of_file
from usam.serving.objects import MarkedMask
from usam.serving.protocol import read_json, three_numbers
from usam.serving.session import ScanSession
from usam.serving.worklist import STATES, WorkList

PAGE = Path(__file__).with_name("page.html")
SCRIPT = Path(__file__).with_name("page.js")
TAB_SECONDS = 20.0  # without a word from a tab, another may take its scan
SAVE_SECONDS = 2.0  # after the last change the label map is written
FINISH_SECONDS = 15.0


class OpenScan:
    """A displayed scan: its session, its reoriented image, and the tab that may edit it."""

    def __init__(self, name: str, path: Path, channel: int | None, model: Clickable) -> None:
        scan = scan_of_file(path, channel)
        self.name, self.tab, self.heard = name, "", 0.0
        self.turn = turn_to_lps(scan.affine)
        self.image = nib.apply_orientation(scan.array, self.turn)
        self.back = nib.orientations.inv_ornt_aff(self.turn, scan.array.shape)
        spacing = scan.spacing or (1.0, 1.0, 1.0)
        order = np.argsort(self.turn[:, 0])
        self.spacing = [float(spacing[axis]) for axis in order]
        self.limits = first_window(self.image)
        self.session = ScanSession(scan, model.open_scan(scan))
        self.lock = threading.RLock()
        self.changed: float | None = None  # when, if the label map is not yet written

    @property
    def labels(self) -> np.ndarray:
        """The label map, oriented like the image."""
        return nib.apply_orientation(self.session.labels, self.turn)

    def voxel(self, place: Any) -> tuple[int, int, int]:
        """The scan's voxel at a position on the page; ValueError if it is outside."""
        found = [round(value) for value in three_numbers(place, "voxel")]
        if any(not 0 <= i < size for i, size in zip(found, self.image.shape, strict=True)):
            raise ValueError(f"voxel {found} lies outside the scan")
        return tuple(int(i) for i in np.rint(nib.affines.apply_affine(self.back, found)))

    def turned(self, part: Part | None) -> list[list[int]] | None:
        """A part of the scan in the page's axes, [[low, high), ...]."""
        if part is None:
            return None
        ends = np.array([[span.start, span.stop - 1] for span in part]).T
        forth = np.linalg.inv(self.back)
        low, high = np.rint(nib.affines.apply_affine(forth, ends)).astype(int)
        pairs = zip(low.tolist(), high.tolist(), strict=True)
        return [[min(a, b), max(a, b) + 1] for a, b in pairs]


def first_window(image: np.ndarray) -> tuple[float, float]:
    """The window a scan is first displayed in: soft tissue for CT, else its percentiles."""
    if float(image[::4, ::4, ::4].min()) < -500:
        return WINDOWS["soft_tissue"]
    return window_limits(image.transpose(2, 1, 0), "percentile")


class Annotation:
    """Answers the page's requests. One scan is open at a time."""

    def __init__(self, work: WorkList, model: Clickable, channel: int | None = None) -> None:
        self.work, self.model, self.channel = work, model, channel
        self.scan: OpenScan | None = None
        self._lock = threading.RLock()

    def routes(self) -> dict[tuple[str, str], Route]:
        """Request handlers by method and path."""
        posts: dict[str, Callable[[dict[str, Any]], Any]] = {
            "open": self.open, "mark": self.mark, "undo": self.undo, "finish": self.finish,
            "label": self.label, "lock": self.lock, "remove": self.remove, "state": self.state,
            "save": self.save_now, "alive": self.alive,
        }  # fmt: skip
        routes = {
            ("GET", "/"): Route(lambda _: _file(PAGE, "text/html"), needs_key=False),
            ("GET", "/page.js"): Route(lambda _: _file(SCRIPT, "text/javascript"), needs_key=False),
            ("GET", "/healthz"): Route(lambda _: Reply({"ok": True}), needs_key=False),
            ("GET", "/api/work"): Route(lambda _: Reply(self.overview())),
            ("GET", "/api/slice"): Route(self.slice),
        }
        for name, function in posts.items():
            routes["POST", f"/api/{name}"] = Route(_posted(function))
        return routes

    def overview(self) -> dict[str, Any]:
        """Scans and labels."""
        work = self.work
        return {
            "scans": [
                {"name": name, "state": work.states.get(name, "open")} for name in work.scans
            ],
            "labels": [
                {"label": label, "name": name, "color": work.colors[label]}
                for label, name in sorted(work.names.items())
            ],
            "model": self.model.name, "points": self.model.points, "boxes": self.model.boxes,
            "volumetric": self.model.is_volumetric,
            "windows": {name: list(limits) for name, limits in WINDOWS.items()},
        }  # fmt: skip

    def open(self, content: dict[str, Any]) -> dict[str, Any]:
        """Open a scan for a tab; a second tab is read-only."""
        name, tab = content.get("scan"), content.get("tab")
        # A name of the list, never a path: nothing else can be read.
        if not isinstance(name, str) or name not in self.work.scans:
            raise ValueError(f"no scan {name!r:.60} in this list")
        if not isinstance(tab, str) or not 8 <= len(tab) <= 64:
            raise ValueError("tab: expected a text of 8 to 64 characters")
        with self._lock, compute:
            if self.scan is None or self.scan.name != name:
                if self.scan is not None and self._is_held(self.scan, tab):
                    raise RefusedError(
                        409, f"another tab works on {self.scan.name}; close it first"
                    )
                self.write()
                self.scan = None  # its memory is free before the next
                scan = OpenScan(name, self.work.scans[name], self.channel, self.model)
                if self.work.marks(name).exists():
                    scan.session.load(self.work.marks(name))
                self.scan = scan
            scan = self.scan
            if not self._is_held(scan, tab):
                scan.tab, scan.heard = tab, time.monotonic()
            return {
                "scan": name, "shape": list(scan.image.shape), "spacing": scan.spacing,
                "window": list(scan.limits), "dtype": scan.image.dtype.name,
                "read_only": scan.tab != tab, **self._objects(scan),
            }  # fmt: skip

    def _is_held(self, scan: OpenScan, tab: str) -> bool:
        return scan.tab not in ("", tab) and time.monotonic() - scan.heard < TAB_SECONDS

    def _objects(self, scan: OpenScan) -> dict[str, Any]:
        rows = [
            {
                "label": one.label, "locked": one.locked, "marks": len(one.mask.marks),
                "voxels": 0 if one.mask.region is None else int(one.mask.region.mask.sum()),
                "more": one.mask.stopped_early,
                "points": [[*scan_place(scan, voxel), sign] for mark in one.mask.marks
                           for voxel, sign in mark.clicks],
            }
            for one in sorted(scan.session.objects, key=lambda one: one.label)
        ]  # fmt: skip
        return {"objects": rows}

    def _mine(self, content: dict[str, Any]) -> OpenScan:
        """The open scan, if the requesting tab may edit it."""
        scan = self.scan
        if scan is None or content.get("scan") != scan.name:
            raise RefusedError(409, "this scan is no longer open; open it again")
        if content.get("tab") != scan.tab:
            raise RefusedError(409, "another tab works on this scan; this one is read-only")
        scan.heard = time.monotonic()
        return scan

    def alive(self, content: dict[str, Any]) -> dict[str, Any]:
        """Heartbeat of a tab."""
        self._mine(content)
        return {}

    def mark(self, content: dict[str, Any]) -> dict[str, Any]:
        """Add a click or a box to an object."""
        scan = self._mine(content)
        mark = read_mark(scan, content)
        return self._changed(scan, content, lambda mask: mask.add(mark))

    def undo(self, content: dict[str, Any]) -> dict[str, Any]:
        """Undo an object's last mark."""
        return self._changed(self._mine(content), content, lambda mask: mask.undo())

    def finish(self, content: dict[str, Any]) -> dict[str, Any]:
        """Extend the segmentation by more windows or slices."""
        scan = self._mine(content)
        return self._changed(scan, content, lambda mask: mask.finish(FINISH_SECONDS))

    def _changed(
        self, scan: OpenScan, content: dict[str, Any], action: Callable[[MarkedMask], Any]
    ) -> dict[str, Any]:
        start = time.monotonic()
        with scan.lock, compute:
            self._label_of(content)
            result, part = scan.session.change(content["label"], action)
            self._keep(scan)
            return {
                "part": scan.turned(part), "done": result is not False,
                "seconds": round(time.monotonic() - start, 2), **self._objects(scan),
            }  # fmt: skip

    def _keep(self, scan: OpenScan) -> None:
        """Write the marks now and the label map shortly after."""
        scan.changed = time.monotonic()
        scan.session.save_marks(self.work.marks(scan.name))

    def lock(self, content: dict[str, Any]) -> dict[str, Any]:
        """Lock or unlock an object."""
        scan = self._mine(content)
        with scan.lock:
            part = scan.session.lock(self._label_of(content), locked=content.get("locked") is True)
            self._keep(scan)
            return {"part": scan.turned(part), **self._objects(scan)}

    def remove(self, content: dict[str, Any]) -> dict[str, Any]:
        """Remove an object of this scan."""
        scan = self._mine(content)
        with scan.lock:
            part = scan.session.remove(self._label_of(content))
            self._keep(scan)
            return {"part": scan.turned(part), **self._objects(scan)}

    def _label_of(self, content: dict[str, Any]) -> int:
        label = content.get("label")
        if type(label) is not int or label not in self.work.names:
            raise ValueError(f"no label {label!r:.20}; add it first")
        return label

    def label(self, content: dict[str, Any]) -> dict[str, Any]:
        """Rename a label of all scans, or add one."""
        self._mine(content)
        with self._lock:
            label = content.get("label")
            if label is None:
                label = self.work.add(content.get("name"))
            else:
                self.work.name(self._label_of(content), content.get("name"), content.get("color"))
            self.work.save()
            return {"label": label, **self.overview()}

    def state(self, content: dict[str, Any]) -> dict[str, Any]:
        """Set the open scan's state: open, done or skipped."""
        scan, state = self._mine(content), content.get("state")
        if state not in STATES:
            raise ValueError(f"state {state!r:.20}: expected {', '.join(STATES)}")
        with self._lock:
            self.work.states[scan.name] = state
            self.write()
            self.work.save()
        return self.overview()

    def save_now(self, content: dict[str, Any]) -> dict[str, Any]:
        """Write the label map now."""
        scan = self._mine(content)
        with scan.lock:
            scan.changed = scan.changed or time.monotonic()
        self.write()
        return {"saved": self.work.label_map(scan.name).name}

    def slice(self, request: Request) -> Reply:
        """A plane of the image or of the label map: rows of the higher axis, little endian."""
        scan, query = self.scan, request.query
        if scan is None or query.get("scan") != scan.name:
            raise RefusedError(409, "this scan is no longer open; open it again")
        values = query.get("axis", ""), query.get("k", "")
        if not all(value.isascii() and value.isdigit() and len(value) < 7 for value in values):
            raise ValueError("axis and k: expected whole numbers")
        axis, k = map(int, values)
        if axis > 2 or k >= scan.image.shape[axis]:
            raise ValueError("the slice lies outside the scan")
        source = scan.labels if query.get("kind") == "label" else scan.image
        plane = np.ascontiguousarray(source.take(k, axis=axis).T)
        body = zlib.compress(plane.astype(plane.dtype.newbyteorder("<"), copy=False).tobytes(), 1)
        return Reply(body, {"Content-Encoding": "deflate"})

    def tick(self) -> None:
        """Write the label map a while after the last change."""
        scan = self.scan
        if scan is None or scan.changed is None:
            return
        if time.monotonic() - scan.changed > SAVE_SECONDS:
            try:
                self.write()
            except (OSError, ValueError) as error:
                scan.changed = time.monotonic() + 30
                say(f"warning: not saved: {error}")

    def write(self) -> None:
        """Write the open scan's label map and prompts, if they have changed."""
        scan = self.scan
        if scan is None or scan.changed is None:
            return
        with scan.lock:
            self.work.save()
            scan.session.save_labels(self.work.label_map(scan.name))
            prompts = scan.session.prompts(self.work.names)
            if prompts:
                write_json(self.work.prompts(scan.name), prompts, sort_keys=False)
            scan.changed = None


def scan_place(scan: OpenScan, voxel: tuple[int, int, int]) -> list[int]:
    """A voxel of the scan in the page's axes."""
    forth = np.linalg.inv(scan.back)
    return np.rint(nib.affines.apply_affine(forth, voxel)).astype(int).tolist()


def read_mark(scan: OpenScan, content: dict[str, Any]) -> Mark:
    """The mark of a request: `voxel`, or `box` of two voxels; `inside` defaults to true."""
    inside = content.get("inside", True) is True
    if "box" not in content:
        return point_mark(scan.voxel(content.get("voxel")), inside=inside)
    box = content["box"]
    if not isinstance(box, list) or len(box) != 2:
        raise ValueError("box: expected its first and last voxel")
    corners = np.array([scan.voxel(corner) for corner in box])
    return box_mark(corners.min(axis=0), corners.max(axis=0), inside=inside)


def describe(work: WorkList) -> str:
    """The progress of the work list as text."""
    done = sum(state == "done" for state in work.states.values())
    return f"{counted(len(work.scans), 'scan')}, {done} done"


def _posted(function: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Reply]:
    return lambda request: Reply(function(read_json(request.body)))


def _file(path: Path, kind: str) -> Reply:
    policy = "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
    return Reply(
        path.read_bytes(), {"Content-Security-Policy": policy}, kind=f"{kind}; charset=utf-8"
    )
