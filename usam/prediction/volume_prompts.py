"""A user's points and boxes as SAM-Med3D takes them: clicks on voxels of a scan's 1.5 mm volume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataset.scans.volumes import ScanVolume
from usam.prediction.prompts import ObjectPrompts
from usam.prediction.windows import Voxel


@dataclass(frozen=True)
class MarkedObject:
    """A user's prompts for one object, in voxels of the volume.

    clicks: (voxel, label), label 1 in the object and 0 outside; box: its first and last voxel;
    centre: the voxel in the middle of the first window, where one is chosen.
    """

    name: str
    label: int
    clicks: tuple[tuple[Voxel, int], ...] = ()
    box: tuple[Voxel, Voxel] | None = None
    centre: Voxel | None = None

    @property
    def box_centre(self) -> Voxel:
        """The middle voxel of the box."""
        return tuple((low + high) // 2 for low, high in zip(*self.box, strict=True))

    @property
    def box_and_clicks(self) -> list[tuple[Voxel, int]]:
        """All clicks; a box becomes a click at its centre, placed first."""
        return [*([(self.box_centre, 1)] if self.box else []), *self.clicks]


def marked(one: ObjectPrompts, scan: ScanVolume, *, mm: bool) -> MarkedObject:
    """An object's prompts in voxels of the volume; ValueError for what lies outside the scan."""
    if one.boxes:
        raise ValueError(f'{one.name}: boxes on slices are for --model u-sam; give a 3D "box"')
    signs = [point[3] for point in one.points]
    voxels = map(tuple, scan.clicks([point[:3] for point in one.points], mm=mm).tolist())
    clicks = tuple(zip(voxels, signs, strict=True))
    centre = one.centre and tuple(scan.clicks([one.centre], mm=mm)[0].tolist())
    if one.box is None:
        return MarkedObject(one.name, one.label, clicks, centre=centre)
    corners = scan.clicks(np.reshape(one.box, (2, 3)), mm=mm)
    low, high = corners.min(axis=0), corners.max(axis=0)
    box = tuple(low.tolist()), tuple(high.tolist())
    return MarkedObject(one.name, one.label, clicks, box, centre)
