"""Intensity windows: their names, their limits in a scan, and uint8 slices made with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dataset.text import counted

Window = tuple[float, float] | str | None

WINDOWS = {
    "abdomen": (-160.0, 240.0),
    "soft_tissue": (-150.0, 250.0),
    "liver": (-45.0, 105.0),
    "mediastinum": (-125.0, 225.0),
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "brain": (0.0, 80.0),
}
PERCENTILES = (0.5, 99.5)
MAX_SAMPLED = 2**24  # voxels that percentiles are taken from
MAX_COUNTED = 2**20  # voxels that the body's values are taken from
MIN_GREYS = 16  # of a scan in its window; fewer are a wrong window or no scan
MAX_SATURATED = 0.95  # share of the voxels above black that may be white
FATTEST = -200  # HU: fat is brighter, air and lungs are darker
BODY = 0.25  # where the body starts between a scan's darkest and brightest values
STORED_RANGE = (0.0, 1.0)  # CARE's own scale, for a store without a window


def parse_window(words: Sequence[str | float]) -> Window:
    """A window from command-line words: LOW HIGH, a preset of WINDOWS, or "percentile".

    Raises ValueError naming the choices.
    """
    if len(words) == 1 and words[0] == "percentile":
        return "percentile"
    if len(words) == 1 and words[0] in WINDOWS:
        return WINDOWS[words[0]]
    try:
        low, high = (float(word) for word in words)
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"window {' '.join(map(str, words))} is not known; wanted LOW HIGH, percentile or one"
            f" of {', '.join(WINDOWS)}"
        )
    return low, high


def window_limits(slices: np.ndarray, window: Window) -> tuple[float, float]:
    """(low, high) in the scan's units; "percentile": the volume's 0.5 and 99.5 percentiles.

    Percentiles come from at most 2^24 voxels on a regular in-plane grid; where they are equal the
    upper limit is one above. None is CARE's [0, 1].
    """
    if window is None:
        return STORED_RANGE
    if window != "percentile":
        return parse_window([window] if isinstance(window, str) else list(window))
    step = math.ceil(math.sqrt(slices.size / MAX_SAMPLED))
    low, high = np.percentile(slices[:, ::step, ::step], PERCENTILES)
    return float(low), float(high if high > low else low + 1)


def apply_window(slices: np.ndarray, window: Window) -> np.ndarray:
    """uint8 slices (S, H, W): low and below is 0, high and above 255, rounded in between.

    Works slice by slice, so a float copy of one slice is all it holds beside the result. Without
    a window [0, 1] is truncated instead, as the CARE release is packed.
    """
    if window is None:
        return (np.clip(slices.astype(np.float64), *STORED_RANGE) * 255).astype(np.uint8)
    low, high = window_limits(slices, window)
    scale = 255.0 / max(high - low, 1e-6)
    out = np.empty(slices.shape, dtype=np.uint8)
    for k, plane in enumerate(slices):
        scaled = plane.astype(np.float32)
        scaled -= np.float32(low)
        scaled *= np.float32(scale)
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        out[k] = scaled
    return out


def window_misfit(slices: np.ndarray, window: Window) -> str:
    """The reason why a window does not suit a scan, as part of a sentence; empty if it does.

    slices (S, H, W) in the scan's units, of which at most 2^24 voxels are looked at. A window
    suits if it leaves at least 16 grey values and at most 95 % of the voxels above black white.
    Neither does it suit a CT stored without its offset: not 1 % of the voxels are as dark as air,
    and half of the body lies more than the window's width above the window. The body is what lies
    above the first quarter between the 1 % and 99 % percentiles.
    """
    step = math.ceil(math.sqrt(slices.size / MAX_SAMPLED))
    sample = slices[:, ::step, ::step]
    low, high = float(sample.min()), float(sample.max())
    if low == high:
        return f"every voxel is {low:g}"
    counts = np.bincount(apply_window(sample, window).ravel(), minlength=256)
    limits = " to ".join(f"{value:g}" for value in window_limits(slices, window))
    greys, above_black = int(np.count_nonzero(counts)), int(counts[1:].sum())
    if greys < MIN_GREYS:
        return (
            f"the window {limits} leaves {counted(greys, 'grey value')}; the scan's values are "
            f"{low:g} to {high:g}"
        )
    if counts[255] > MAX_SATURATED * above_black:
        return (
            f"the window {limits} shows {counts[255] / above_black:.0%} of the voxels above its "
            f"lower limit as white; the scan's values are {low:g} to {high:g}"
        )
    bottom, top = window_limits(slices, window)
    few = sample.ravel()[:: sample.size // MAX_COUNTED + 1]
    darkest, brightest = np.percentile(few, (1, 99))
    body = few[few > darkest + BODY * (brightest - darkest)]
    middle = float(np.median(body)) if body.size else top
    if darkest > FATTEST and middle > top + (top - bottom):
        return (
            f"the window {limits} lies below the body, half of which is above {middle:.4g}; is an "
            f"offset missing? The scan's values are {low:g} to {high:g}"
        )
    return ""
