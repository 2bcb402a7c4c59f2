"""Changes of slices within their plane: the box around the patient, cropping, resampling."""

from __future__ import annotations

from dataclasses import replace

import cv2
import nibabel as nib
import numpy as np

from dataset.scans.orientation import SliceStack
from dataset.scans.window import Window, window_limits

Box = tuple[int, int, int, int]  # y0, y1, x0, x1 of canonical slices; ends excluded
BODY_HU = -300.0


def body_box(slices: np.ndarray, window: Window, margin: int = 8) -> Box:
    """Smallest in-plane box (y0, y1, x0, x1) that holds the patient in every slice.

    slices in the scan's units. In each slice the largest piece above -300 HU counts, so that the
    table is left out; with "percentile", above a tenth of the window. margin in pixels.
    """
    low, high = window_limits(slices, window)
    threshold = low + 0.1 * (high - low) if window in ("percentile", None) else BODY_HU
    step = 4  # a coarse grid is enough for a box with a margin
    height, width = slices.shape[1:]
    found = []
    for plane in slices[:, ::step, ::step]:
        solid = cv2.morphologyEx(
            (plane > threshold).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)
        )
        pieces = cv2.connectedComponentsWithStats(solid)[2][1:]
        if len(pieces):
            x, y, w, h, _ = pieces[pieces[:, cv2.CC_STAT_AREA].argmax()]
            found.append((y, y + h, x, x + w))
    if not found:
        return 0, height, 0, width
    y0, _, x0, _ = np.min(found, axis=0) * step - margin
    _, y1, _, x1 = np.max(found, axis=0) * step + margin
    return max(int(y0), 0), min(int(y1), height), max(int(x0), 0), min(int(x1), width)


def crop(volume: SliceStack, box: Box) -> SliceStack:
    """The volume inside an in-plane box; a view, with the affine moved along."""
    y0, y1, x0, x1 = box
    affine = volume.affine
    if affine is not None:
        affine = affine @ nib.affines.from_matvec(np.eye(3), (x0, y0, 0))
    return replace(volume, slices=volume.slices[:, y0:y1, x0:x1], affine=affine)


def resample_in_plane(volume: SliceStack, target: float, *, labels: bool = False) -> SliceStack:
    """Slices resampled to about `target` mm a pixel, LPS orientation; sizes are whole pixels.

    Images (uint8) are averaged when they shrink and interpolated when they grow; labels take the
    nearest pixel. Pixel grids share their outer edges, so F.interpolate with
    align_corners=False leads back. Raises ValueError without a spacing, or for an absurd size.
    """
    if volume.spacing is None:
        raise ValueError("a release without spacing cannot be resampled; leave --spacing out")
    count, height, width = volume.slices.shape
    z, y, x = volume.spacing
    new_height, new_width = (max(1, round(n * mm / target)) for n, mm in ((height, y), (width, x)))
    if max(new_height, new_width) > 8192:
        raise ValueError(f"--spacing {target} gives slices of {new_height} x {new_width} pixels")
    if (new_height, new_width) == (height, width):
        return volume
    shrinks = new_height <= height and new_width <= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = np.empty((count, new_height, new_width), dtype=volume.slices.dtype)
    for k, plane in enumerate(volume.slices):
        cv2.resize(
            np.ascontiguousarray(plane),
            (new_width, new_height),
            dst=out[k],
            interpolation=cv2.INTER_NEAREST_EXACT if labels else how,
        )
    grow = np.array([width / new_width, height / new_height, 1.0])
    affine = volume.affine @ nib.affines.from_matvec(np.diag(grow), (grow - 1) / 2)
    return SliceStack(out, (z, y * height / new_height, x * width / new_width), affine)
