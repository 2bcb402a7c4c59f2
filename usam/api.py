"""Models from Python: load one, segment scans, click. The command line goes the same way.

Options are called as the flags of u-sam.py, mean the same and are refused in the same words.
"""

from __future__ import annotations

import math
import operator
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from dataset.labels import MAX_LABEL
from dataset.scans.header import Scan
from dataset.scans.read import IN_MEMORY, scan_of
from usam.cli.parser import fill_defaults, flags_of
from usam.prediction import predict as prediction
from usam.prediction.prompts import read_prompts
from usam.prediction.results import Segmentation, count_voxels, measured, measured_text
from usam.prediction.scans import in_one_line
from usam.runtime.precision import select_precision
from usam.runtime.processes import select_device
from usam.serving.marks import Mark, box_mark, point_mark
from usam.serving.model import check_clickable, clickable
from usam.serving.session import ScanSession
from usam.training.resume import find_checkpoint
from usam.weights.inference import averaged

if TYPE_CHECKING:
    import nibabel
    import SimpleITK

    AnyScan = str | Path | np.ndarray | nibabel.spatialimages.SpatialImage | SimpleITK.Image

PLACEHOLDER = {"predict": IN_MEMORY, "prompts": "prompts"}  # scan and prompts are given later


def load(
    checkpoint: str | Path | Sequence[str | Path] | None = None,
    *,
    model: str | None = None,
    sam_model: str | None = None,
    sam_weight: str | Path | None = None,
    sam_preprocess: str | None = None,
    rel_pos: str | None = None,
    tta: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    amp: str = "auto",
) -> Model:
    """The model of a checkpoint, or the average of several, as --resume takes them.

    Without a checkpoint: SAM's own weights (sam_model="vit_t" for LiteMedSAM's, or the file
    `sam_weight`), or with model="sam-med3d" the published SAM-Med3D. tta="flip" or "flip+rot"
    averages views. Raises FileNotFoundError and ValueError, with one line, as u-sam.py does.
    """
    is_one = isinstance(checkpoint, str | Path)
    options = {
        "resume": [checkpoint] if is_one else list(checkpoint or ()),
        "model": model, "sam_model": sam_model, "sam_weight": sam_weight, "rel_pos": rel_pos,
        "sam_preprocess": sam_preprocess, "tta": tta, "batch_size": batch_size,
        "device": device, "amp": amp,
    }  # fmt: skip
    args = flags_of(options | PLACEHOLDER)
    args.resume, saved = find_checkpoint(
        args.resume, Path(), args.sam_weight, more=bool(args.ensemble)
    )
    fill_defaults(args, saved)
    saved = averaged(saved) if saved else None
    precision = select_precision(args.amp, select_device(args.device, 0))
    described = saved and {"args": saved["args"], "data": saved["data"]}
    return Model(prediction.load(args, precision, saved), options, described)


class Model:
    """A loaded model, from `load`."""

    def __init__(
        self,
        model: prediction.Model,
        options: Mapping[str, Any],
        described: Mapping[str, Any] | None,
    ) -> None:
        self._model, self._options, self._described = model, dict(options), described

    def predict(
        self,
        scan: AnyScan,
        *,
        prompts: Mapping[str, Any] | str | Path | None = None,
        affine: ArrayLike | None = None,
        spacing: Sequence[float] | None = None,
        probabilities: bool = False,
        largest_component: bool = False,
        window: str | Sequence[float] | None = None,
        init_mask: str | Path | None = None,
        channel: int | None = None,
        series: int | None = None,
    ) -> Segmentation:
        """The label map, class names and volumes of a scan; `save` writes what --predict writes.

        scan: path, nibabel or SimpleITK image, or array (I, J, K) in HU with `affine` (voxel index
        -> RAS mm) or `spacing` (mm; its axes are then taken to lead left, back and up). prompts:
        what a file of --prompts holds for one scan, or its path. probabilities: of all classes,
        in memory. Raises FileNotFoundError and ValueError, with one line.
        """
        found = scan_of(scan, affine=affine, spacing=spacing, channel=channel, series=series)
        is_file = isinstance(prompts, str | Path)
        args = self._flags(
            prompts=prompts if is_file else None if prompts is None else PLACEHOLDER["prompts"],
            probabilities=probabilities, largest_component=largest_component, window=window,
            init_mask=init_mask,
        )  # fmt: skip
        with _in_one_line(found):
            contents = None
            if is_file:
                contents = read_prompts(Path(prompts), [found.path])
            elif prompts is not None:
                contents = prediction.prompts_in_memory(prompts, found.path)
            return self._model.segment(found, args, contents)

    def session(
        self,
        scan: AnyScan,
        *,
        affine: ArrayLike | None = None,
        spacing: Sequence[float] | None = None,
        window: str | Sequence[float] | None = None,
        channel: int | None = None,
        series: int | None = None,
    ) -> Session:
        """A scan to mark objects in, click by click; arguments as of `predict`.

        Raises ValueError for a model without prompts, and for SAM's own weights.
        """
        args = self._flags(window=window, prompts=PLACEHOLDER["prompts"])
        if self._described is None and args.model != "sam-med3d":
            raise ValueError(
                "a session needs a checkpoint of U-SAM, or SAM-Med3D; with SAM's own weights give "
                "the prompts to predict"
            )
        check_clickable(args)
        found = scan_of(scan, affine=affine, spacing=spacing, channel=channel, series=series)
        with _in_one_line(found):
            opened = clickable(self._model, args, math.inf).open_scan(found)
        return Session(ScanSession(found, opened), self._model.facts)

    def _flags(self, **given: Any) -> Namespace:
        """The flags of one prediction, as those of a command line with the model's options."""
        args = flags_of({**self._options, "predict": IN_MEMORY, **given})
        fill_defaults(args, self._described)
        return args


class Session:
    """Objects that are marked in one scan by clicks and boxes, from `Model.session`.

    Voxels are indices along the axes of the scan as stored, from 0. An object is called by its
    number in the label map, `label`.
    """

    def __init__(self, session: ScanSession, facts: Mapping[str, Any]) -> None:
        self._session, self._facts = session, facts

    def click(self, voxel: Sequence[int], *, inside: bool = True, label: int = 1) -> np.ndarray:
        """The object's mask (I, J, K) bool after a click inside or outside it."""
        return self._add(point_mark(_voxel(voxel), inside=inside), label)

    def box(self, first: Sequence[int], last: Sequence[int], *, label: int = 1) -> np.ndarray:
        """The object's mask (I, J, K) bool after a box from its first to its last voxel.

        For U-SAM a box lies on one slice.
        """
        ends = np.array([_voxel(first), _voxel(last)])
        low, high = ends.min(axis=0).tolist(), ends.max(axis=0).tolist()
        return self._add(box_mark(tuple(low), tuple(high), inside=True), label)

    def undo(self, *, label: int = 1) -> np.ndarray:
        """The object's mask without its last click or box."""
        self._session.change(label, lambda mask: mask.undo())
        return self._session.labels == label

    def _add(self, mark: Mark, label: int) -> np.ndarray:
        with _in_one_line(self._session.scan):
            self._session.change(label, lambda mask: mask.add(mark))
        return self._session.labels == label

    @property
    def label_map(self) -> np.ndarray:
        """(I, J, K) uint8: where objects overlap, the one that was changed last has the voxel."""
        return self._session.labels.copy()

    @property
    def result(self) -> Segmentation:
        """The objects so far, with names and volumes; `result.save(path)` writes them."""
        header, label = self._session.scan.header, self.label_map
        voxels = count_voxels(label, MAX_LABEL + 1).tolist()
        rows = [
            {"name": _name(one.label), "label": one.label, "marks": len(one.mask.marks),
             **measured(voxels[one.label], header.voxel_ml)}
            for one in sorted(self._session.objects, key=lambda one: one.label)
        ]  # fmt: skip
        about = {"input": header.path.name, "shape": list(header.shape), **self._facts}
        text = ", ".join(map(measured_text, rows)) or "no object"
        return Segmentation(label, header, "objects", rows, about, list(header.remarks), text)

    def prompts(self) -> dict[str, Any] | None:
        """The marks in the form that `Model.predict` and --prompts read; None without any."""
        names = {one.label: _name(one.label) for one in self._session.objects}
        return self._session.prompts(names)

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write the label map and its description as `Segmentation.save` does."""
        return self.result.save(path, overwrite=overwrite)


def _name(label: int) -> str:
    return "object" if label == 1 else f"object {label}"


def _voxel(values: Sequence[int]) -> tuple[int, int, int]:
    try:
        x, y, z = (operator.index(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"a voxel is three whole numbers x, y, z; found {values!r:.80}") from None
    return x, y, z


@contextmanager
def _in_one_line(scan: Scan) -> Iterator[None]:
    """Context manager that raises errors in the words of the command line, naming the scan."""
    try:
        yield
    except AssertionError:  # a mistake of ours
        raise
    except Exception as error:
        raise in_one_line(scan.path, error) from error
