"""Points and boxes placed in 3D Slicer and saved as .mrk.json, as the content of a prompts file.

Source: Slicer's markups schema 1.0. A point list ("Fiducial") is the clicks on one object, an ROI
a box around it; a point whose label begins with "-" marks what is not the object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIGNS = {"LPS": (-1, -1, 1), "RAS": (1, 1, 1)}  # to RAS
UPRIGHT = (1, 0, 0, 0, 1, 0, 0, 0, 1)  # an orientation along the axes, signs aside
POINTS, BOX = "Fiducial", "ROI"


def is_markups(content: Any) -> bool:
    """Whether the content of a JSON file is a markups file of 3D Slicer."""
    return isinstance(content, dict) and isinstance(content.get("markups"), list)


def as_slice_prompts(content: Mapping[str, Any]) -> dict[str, Any]:
    """The points of a markups file as prompts for U-SAM, in RAS mm. Raises ValueError for boxes."""
    points = []
    for markup in content["markups"]:
        kind = _kind(markup)
        if kind != POINTS:
            raise ValueError(f"markup of type {kind!r:.40}: U-SAM takes point lists; give --box")
        points += _points(markup)
    return {"points": points, "mm": True}


def as_volume_prompts(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The points and boxes of a markups file as prompts for one object of SAM-Med3D, in RAS mm."""
    one: dict[str, Any] = {"name": name, "points": []}
    for markup in content["markups"]:
        kind = _kind(markup)
        if kind == POINTS:
            one["points"] += _points(markup)
        elif kind == BOX and "box" not in one:
            one["box"] = _box(markup)
        else:
            raise ValueError(
                f"markup of type {kind!r:.40}: expected point lists (Fiducial) and at most one ROI"
            )
    return {"objects": [one], "mm": True}


def _kind(markup: Any) -> Any:
    if not isinstance(markup, dict):
        raise ValueError(f"a markup must be a JSON object, found {markup!r:.80}")
    units = markup.get("coordinateUnits", "mm")
    if units != "mm":
        raise ValueError(f"coordinateUnits {units!r:.40}: expected mm")
    return markup.get("type")


def _points(markup: Mapping[str, Any]) -> list[list[float]]:
    """The points of a list as [x, y, z, label] in RAS mm; those not placed yet are left out."""
    placed = []
    controls = markup.get("controlPoints")
    for control in controls if isinstance(controls, list) else ():
        if not isinstance(control, dict):
            raise ValueError(f"a control point must be a JSON object, found {control!r:.80}")
        if control.get("positionStatus", "defined") == "defined":
            outside = str(control.get("label", "")).startswith("-")
            placed.append([*_ras(control.get("position"), markup), 0 if outside else 1])
    return placed


def _box(markup: Mapping[str, Any]) -> list[float]:
    """The corners of an ROI, [x1, y1, z1, x2, y2, z2] in RAS mm."""
    turned = _plain(markup.get("orientation", list(UPRIGHT)))
    near = zip(turned, UPRIGHT, strict=False)
    if len(turned) != 9 or any(abs(abs(value) - wanted) > 1e-6 for value, wanted in near):
        raise ValueError("the ROI is rotated; expected one along the axes")
    centre, size = _ras(markup.get("center"), markup), _plain(markup.get("size"))
    if len(size) != 3:
        raise ValueError(f"an ROI's size must be three numbers, found {markup.get('size')!r:.80}")
    low = [c - s / 2 for c, s in zip(centre, size, strict=True)]
    high = [c + s / 2 for c, s in zip(centre, size, strict=True)]
    return [*low, *high]


def _ras(position: Any, markup: Mapping[str, Any]) -> list[float]:
    """A position of the markup's own coordinate system in RAS."""
    system = markup.get("coordinateSystem", "LPS")
    if system not in SIGNS:
        raise ValueError(f"coordinateSystem {system!r:.40}: expected LPS or RAS")
    numbers = _plain(position)
    if len(numbers) != 3:
        raise ValueError(f"a position must be three numbers, found {position!r:.80}")
    return [sign * value for sign, value in zip(SIGNS[system], numbers, strict=True)]


def _plain(values: Any) -> list[float]:
    """A list of numbers; ValueError for anything else."""
    fits = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if not fits:
        raise ValueError(f"expected a list of numbers, found {values!r:.80}")
    return values
