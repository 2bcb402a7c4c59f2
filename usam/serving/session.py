"""Several named objects of one scan: marked one by one, without overlap, saved and restored."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import write_json
from dataset.labels import MAX_LABEL
from dataset.scans.header import Scan
from dataset.scans.write import write_label_map
from usam.serving.marks import Mark, Part
from usam.serving.objects import MarkedMask, Region, union

FORMAT = 1


@dataclass
class NamedObject:
    """An object of a scan: its id in the label map, its marks, and whether others may cover it."""

    label: int
    mask: MarkedMask
    locked: bool = False


class ScanSession:
    """The objects of one scan and their label map (I, J, K) uint8, `labels`.

    Where objects overlap, a locked one keeps its voxels, and of others the one changed last has
    them. Undo gives them back: each object's own mask stays whole.
    """

    def __init__(self, scan: Scan, make: Callable[[], MarkedMask]) -> None:
        self.scan, self._make = scan, make
        self.labels = np.zeros(scan.array.shape, dtype=np.uint8)
        self.objects: list[NamedObject] = []  # the one changed last is the last

    def object(self, label: int) -> NamedObject:
        """The object of a label id, a new one if there is none."""
        if not (type(label) is int and 1 <= label <= MAX_LABEL):
            raise ValueError(f"label {label!r:.20}: expected a whole number from 1 to {MAX_LABEL}")
        found = next((one for one in self.objects if one.label == label), None)
        if found is None:
            found = NamedObject(label, self._make())
            self.objects.append(found)
        return found

    def change(self, label: int, action: Callable[[MarkedMask], Any]) -> tuple[Any, Part | None]:
        """The result of `action` on an object's mask, and the part of the label map that changed.

        Raises ValueError for a locked object.
        """
        one = self.object(label)
        if one.locked:
            raise ValueError("this object is locked; unlock it to change it")
        before = one.mask.region
        result = action(one.mask)
        self.objects.remove(one)
        self.objects.append(one)
        part = union(before, one.mask.region)
        self._draw(part)
        return result, part

    def lock(self, label: int, *, locked: bool) -> Part | None:
        """Lock or unlock an object; returns the part of the label map that may have changed."""
        one = self.object(label)
        one.locked = locked
        part = union(one.mask.region, None)
        self._draw(part)
        return part

    def remove(self, label: int) -> Part | None:
        """Remove an object; returns the part of the label map that changed."""
        one = self.object(label)
        if one.locked:
            raise ValueError("this object is locked; unlock it to remove it")
        self.objects.remove(one)
        part = union(one.mask.region, None)
        self._draw(part)
        return part

    def _draw(self, part: Part | None) -> None:
        """Redraw one part of the label map."""
        if part is None:
            return
        view = self.labels[part]
        view[...] = 0
        order = sorted(self.objects, key=lambda one: one.locked)  # stable: locked ones on top
        taken = np.zeros(view.shape, dtype=bool)
        for one in reversed(order):
            if one.mask.region is None:
                continue
            inside, own = _common(part, one.mask.region.part)
            if inside is not None:
                free = one.mask.region.mask[own] & ~taken[inside]
                view[inside][free] = one.label
                taken[inside] |= free

    # ------------------------------------------------------------------ files

    def save_labels(self, path: Path) -> None:
        """Write the label map as a NIfTI in the scan's geometry."""
        write_label_map(path, self.labels, self.scan.header)

    def prompts(self, names: dict[int, str]) -> dict[str, Any] | None:
        """The marks of all objects in the form that --prompts reads; None without any."""
        found = [(one, one.mask.prompts()) for one in self.objects]
        found = [(one, content) for one, content in found if content]
        if not found:
            return None
        if "boxes" not in found[0][1]:
            rows = [{"name": names[one.label], "label": one.label, **c} for one, c in found]
            return {"objects": sorted(rows, key=lambda row: row["label"]), "mm": False}
        points = [point for _, content in found for point in content["points"]]
        boxes = {box["slice"]: box for _, content in found for box in content["boxes"]}
        return {"points": points, "boxes": list(boxes.values()), "mm": False}

    def save_marks(self, path: Path) -> None:
        """Write everything that `load` needs; small enough to be written after each click."""
        objects = [
            {
                "label": one.label, "locked": one.locked,
                "marks": [
                    {"clicks": [[*voxel, sign] for voxel, sign in mark.clicks], "box": mark.box}
                    for mark in one.mask.marks
                ],
                "start": _packed(None if one.mask.start is None else Region.of(one.mask.start)),
                "region": _packed(one.mask.region),
            }
            for one in self.objects
        ]  # fmt: skip
        content = {"program": "u-sam.py", "annotation": FORMAT, "objects": objects,
                   "shape": list(self.labels.shape)}  # fmt: skip
        write_json(path, content, None)

    def load(self, path: Path) -> None:
        """Read what `save_marks` wrote; raises ValueError for a file of another scan or program."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["annotation"] != FORMAT or content["shape"] != list(self.labels.shape):
                raise ValueError("it belongs to another scan or version")
            for row in content["objects"]:
                one = self.object(row["label"])
                marks = [
                    Mark(tuple((tuple(place), sign) for *place, sign in mark["clicks"]),
                         mark["box"] and tuple(map(tuple, mark["box"])))
                    for mark in row["marks"]
                ]  # fmt: skip
                for mark in marks:
                    one.mask.check(mark)
                start = _unpacked(row["start"], self.labels.shape)
                one.mask.resume(marks, start, _unpacked(row["region"], self.labels.shape))
                one.locked = bool(row["locked"])
        except (KeyError, TypeError, IndexError, zlib.error, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); move it away") from None
        self._draw(tuple(slice(0, size) for size in self.labels.shape))


def _common(part: Part, other: Part) -> tuple[Part | None, Part | None]:
    """The overlap of two parts, in the first and in the second; None if there is none."""
    inside, own = [], []
    for a, b in zip(part, other, strict=True):
        low, high = max(a.start, b.start), min(a.stop, b.stop)
        if low >= high:
            return None, None
        inside.append(slice(low - a.start, high - a.start))
        own.append(slice(low - b.start, high - b.start))
    return tuple(inside), tuple(own)


def _packed(region: Region | None) -> dict[str, Any] | None:
    if region is None:
        return None
    bits = zlib.compress(np.packbits(region.mask).tobytes(), 1)
    part = [[span.start, span.stop] for span in region.part]
    return {"part": part, "bits": base64.b64encode(bits).decode("ascii")}


def _unpacked(content: dict[str, Any] | None, shape: tuple[int, ...]) -> Region | None:
    if content is None:
        return None
    part = tuple(slice(low, high) for low, high in content["part"])
    if not all(0 <= s.start < s.stop <= size for s, size in zip(part, shape, strict=True)):
        raise ValueError("a region lies outside the scan")
    sizes = tuple(span.stop - span.start for span in part)
    number = int(np.prod(sizes))
    raw = zlib.decompressobj().decompress(base64.b64decode(content["bits"]), (number + 7) // 8)
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=number)
    return Region(part, bits.reshape(sizes).astype(bool))
