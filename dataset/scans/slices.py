"""A scan as uint8 slices, prepared one by one as for the training of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dataset.scans.header import Scan, ScanHeader
from dataset.scans.in_plane import body_box, resample_in_plane
from dataset.scans.orientation import SliceStack, to_canonical
from dataset.scans.read import read_scan
from dataset.scans.window import Window, apply_window, window_limits
from dataset.slices import equalize, neighbours, resize_image


class ScanSlices:
    """The slices of one scan, prepared one by one as the checkpoint's `data` says.

    data: window, orientation, spacing, img_size and, where recorded, clahe, crop, body_crop and
    input (see SliceDataset.info). `window` replaces the recorded one; `channel` picks one of
    several volumes. Raises what read_scan raises, and ValueError where the scan lacks what the
    model was trained on. A Scan that was read before may be given in place of the path.

    shape is (S, H, W), of canonical slices at native size; box (y0, y1, x0, x1), ends excluded, is
    the part of them that the model sees. Nothing but the scan itself is held in memory.
    """

    def __init__(
        self,
        path: Path | Scan,
        data: Mapping[str, Any],
        *,
        window: Window = None,
        channel: int | None = None,
        series: int | None = None,
    ) -> None:
        self.scan = path if isinstance(path, Scan) else read_scan(path, channel, series)
        self.orientation = data["orientation"]
        self.volume = to_canonical(self.scan, self.orientation)
        self.shape = self.volume.slices.shape
        self.window = self._chosen_window(data["window"], window)
        self.spacing = data.get("spacing")
        self.img_size = data["img_size"]
        self.clahe = bool(data.get("clahe"))
        self.input = data.get("input", "2d")
        # Percentiles are those of the whole volume, as in preparation.
        self._limits = None
        if self.window is not None:
            self._limits = window_limits(self.volume.slices, self.window)
        self.box = self._seen(data.get("crop") or 0.0, body_crop=bool(data.get("body_crop")))

    def _chosen_window(self, trained: Window, given: Window) -> Window:
        is_npz = self.scan.header.format == "npz"
        if is_npz and trained not in (None, "percentile"):
            raise ValueError(
                f"{self.scan.path}: a CARE slice holds no HU; the checkpoint was trained on window "
                f"{trained}; give it the scan in HU (NIfTI, DICOM), or a checkpoint trained on CARE"
            )
        if is_npz:
            return trained
        if trained is None and given is None:
            raise ValueError(
                f"{self.scan.path}: the checkpoint records no intensity window (it was trained on "
                "CARE); pass --window LOW HIGH or a preset, for instance --window soft_tissue"
            )
        return given if given is not None else trained

    def _seen(self, crop: float, *, body_crop: bool) -> tuple[int, int, int, int]:
        """The body's box, with the fraction `crop` of its side cut off at each edge."""
        y0, y1, x0, x1 = 0, self.shape[1], 0, self.shape[2]
        if body_crop:
            y0, y1, x0, x1 = body_box(self.volume.slices, self.window)
        top, left = round((y1 - y0) * crop), round((x1 - x0) * crop)
        return y0 + top, y1 - top, x0 + left, x1 - left

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def header(self) -> ScanHeader:
        """The scan's header: path, format, shape and affine in file order."""
        return self.scan.header

    def plane(self, k: int) -> np.ndarray:
        """Slice k at native size, windowed: uint8 (H, W)."""
        return apply_window(self.volume.slices[k : k + 1], self._limits)[0]

    def model_input(self, k: int) -> np.ndarray:
        """Slice k as in training: uint8 (1 or, for 2.5D, 3, img_size, img_size)."""
        shown = neighbours(k, len(self)) if self.input == "2.5d" else [k]
        planes = {number: self._channel(number) for number in set(shown)}
        return np.stack([planes[number] for number in shown])

    def _channel(self, k: int) -> np.ndarray:
        y0, y1, x0, x1 = self.box
        seen = self.volume.slices[k : k + 1, y0:y1, x0:x1]
        shown = apply_window(seen, self._limits)
        image = SliceStack(shown, self.volume.spacing, self.volume.affine)
        if self.spacing:
            image = resample_in_plane(image, self.spacing)
        plane = np.ascontiguousarray(image.slices[0])
        if self.clahe:
            plane = equalize(plane)
        return resize_image(plane, self.img_size)

    def canonical(self, array: np.ndarray) -> np.ndarray:
        """An array (I, J, K) in the scan's own axes as slices (S, H, W); a view to write to."""
        return to_canonical(Scan(array, self.scan.header), self.orientation).slices

    @property
    def pixel_aspect(self) -> float:
        """Height over width of a pixel of an upright slice; 1 where millimetres are unknown."""
        if self.volume.spacing is None:
            return 1.0
        _, down, across = self.volume.spacing
        return across / down if self.orientation == "stored" else down / across

    @property
    def slice_axis(self) -> int:
        """Which of the scan's own axes (0, 1, 2) runs through the slices."""
        if self.scan.affine is None:
            return 2
        return int(np.argmax(nib.io_orientation(self.scan.affine)[:, 0] == 2))  # head-feet

    def locate(self, voxels: np.ndarray) -> np.ndarray:
        """Voxel indices (P, 3) of the scan's own axes as (slice, row, column) (P, 3) float."""
        if self.scan.affine is None:
            x, y, z = np.asarray(voxels, dtype=np.float64).T
        else:
            to_lps = np.linalg.inv(self.volume.affine) @ self.scan.affine
            x, y, z = nib.affines.apply_affine(to_lps, voxels).T
        return np.stack([z, x, y] if self.orientation == "stored" else [z, y, x], axis=1)
