"""What a prediction found, and its files: names, what may be replaced, class volumes, JSON.

Nothing of a patient but the voxels' place goes into any of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import file_digest, write_json
from dataset.scans.find import scan_stem
from dataset.scans.header import ScanHeader
from dataset.scans.write import STEPS, ProbabilityArray, write_label_map
from dataset.text import counted, printable

PROGRAM = "u-sam.py"
NNUNET_CHANNEL = "_0000"  # at the end of a scan's name in nnU-Net's layout
MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class ResultFiles:
    """Where the results of one scan go. plain: the label map is NAME.nii.gz, as nnU-Net's."""

    folder: Path
    name: str
    plain: bool = False

    @property
    def label_map(self) -> Path:
        """The label map, uint8 NIfTI."""
        return self.folder / f"{self.name}{'' if self.plain else '_seg'}.nii.gz"

    @property
    def description(self) -> Path:
        """The description: what was found and how, JSON."""
        return self.folder / f"{self.name}{'' if self.plain else '_seg'}.json"

    @property
    def overlay(self) -> Path:
        """The picture of --overlay."""
        return self.folder / f"{self.name}_overlay.png"

    @property
    def probabilities(self) -> Path:
        """The 4D NIfTI of --probabilities."""
        return self.folder / f"{self.name}_probabilities.nii"

    def check(self, scans: Set[Path], *, overwrite: bool) -> None:
        """Raises ValueError if writing here would replace a file that must not be replaced.

        That is one of `scans`, resolved paths, in any case; without `overwrite`, any file that no
        earlier prediction wrote and a label map that was edited since.
        """
        files = (self.label_map, self.description, self.overlay, self.probabilities)
        present = [file for file in files if file.exists()]
        for file in present:
            if file.resolve() in scans:
                raise ValueError(f"{file} is a scan to segment, which results would replace; "
                                 "choose another --output_dir")  # fmt: skip
        if overwrite or not present:
            return
        earlier = read_description(self.description)
        if earlier is None:
            raise ValueError(f"{present[0]} was not written by this program; move it away, choose "
                             "another --output_dir, or pass --overwrite")  # fmt: skip
        digest = earlier.get("label_map_sha256")
        if digest and self.label_map.exists() and file_digest(self.label_map) != digest:
            raise ValueError(f"{self.label_map} was edited after this program wrote it; move it "
                             "away, choose another --output_dir, or pass --overwrite")  # fmt: skip

    def remove_others(self, written: Iterable[Path]) -> None:
        """Remove pictures and probabilities of an earlier scan that this run did not write."""
        for file in {self.overlay, self.probabilities} - set(written):
            file.unlink(missing_ok=True)

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write the description: `facts` and the digest of the label map, as strict JSON."""
        content = {"program": PROGRAM, **facts, "label_map_sha256": file_digest(self.label_map)}
        write_json(self.description, content, 2, sort_keys=False)


def read_description(path: Path) -> dict[str, Any] | None:
    """The content of a description that a prediction wrote; None for any other file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    # Those of earlier versions do not name the program.
    fits = isinstance(content, dict) and {"checkpoint", "model"} <= content.keys()
    return content if fits and ("classes" in content or "objects" in content) else None


def without_results(scans: Sequence[Path], named: Iterable[Path]) -> list[Path]:
    """`scans` without the results of earlier predictions; those that are `named` stay."""
    named = set(named)
    return [scan for scan in scans if scan in named or not is_result(scan)]


def is_result(path: Path) -> bool:
    """Whether a file is a label map or probabilities that a prediction wrote."""
    stem, names = scan_stem(path), [scan_stem(path)]
    if stem.endswith("_probabilities"):
        scan = stem.removesuffix("_probabilities")
        names = [scan, f"{scan}_seg"]
    return any(read_description(path.with_name(f"{name}.json")) is not None for name in names)


def result_names(scans: Iterable[Path]) -> list[str]:
    """A name for each scan's results: that of its file or folder, without the suffix.

    The channel number _0000 of nnU-Net's layout is left out where this gives no two scans the same
    name. Scans of one name get the folder's name in front, and if need be a number behind.
    """
    scans = [scan.absolute() for scan in scans]
    stems = [scan_stem(scan) for scan in scans]
    short = [stem.removesuffix(NNUNET_CHANNEL) or stem for stem in stems]
    taken = Counter(short) + Counter(set(stems) - set(short))
    stems = [new if taken[new] == 1 else old for old, new in zip(stems, short, strict=True)]
    number_of = Counter(stems)
    names: list[str] = []
    for scan, stem in zip(scans, stems, strict=True):
        name = base = stem if number_of[stem] == 1 else f"{scan.parent.name}_{stem}"
        number = 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


# ------------------------------------------------------------------ what was found


@dataclass(frozen=True)
class Segmentation:
    """What a model found in one scan: `label_map`, `classes`, `volumes_ml`, `save`.

    label_map (I, J, K) uint8 lies on the scan's voxels, in the order of its file or array; header
    is the scan's. rows: the classes or objects (`kind`) as --predict describes them.
    """

    label_map: np.ndarray
    header: ScanHeader
    kind: str
    rows: list[dict[str, Any]]
    about: Mapping[str, Any]  # the rest of the description
    warnings: list[str]
    text: str  # the rows, for the terminal
    draw: Callable[[Path, str], None] | None = field(default=None, repr=False)  # path, title
    steps: ProbabilityArray | None = field(default=None, repr=False)
    written: tuple[Path, ...] = ()  # files of this prediction that exist already

    @property
    def classes(self) -> dict[int, str]:
        """Names by the number in the label map."""
        return {row.get("id", row.get("label")): row["name"] for row in self.rows}

    @property
    def volumes_ml(self) -> dict[str, float | None]:
        """Volumes in ml by name, without the background; None where spacing is unknown."""
        named = zip(self.classes.items(), self.rows, strict=True)
        return {name: row["volume_ml"] for (number, name), row in named if number}

    @property
    def affine(self) -> np.ndarray | None:
        """(4, 4) voxel index -> RAS mm; None for a CARE slice."""
        return self.header.affine

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size in mm along the label map's axes; None where it is unknown."""
        return self.header.spacing

    @property
    def probabilities(self) -> np.ndarray | None:
        """(classes, I, J, K) float32; None unless they were requested."""
        if self.steps is None:
            return None
        return np.moveaxis(self.steps.steps, -1, 0).astype(np.float32) / STEPS

    def save(
        self, path: str | Path, *, overlay: bool = False, overwrite: bool = False
    ) -> list[Path]:
        """Write what --predict writes, into a folder or as NAME.nii.gz; returns the files.

        In a folder they have the names that --predict gives them. Raises ValueError where a file
        would be replaced that --predict would not replace, unless with `overwrite`.
        """
        path = Path(path)
        if path.name.endswith(".nii.gz") and not path.is_dir():
            files = ResultFiles(path.parent, path.name.removesuffix(".nii.gz"), plain=True)
        elif path.suffix and not path.is_dir():
            raise ValueError(f"{path}: expected a folder, or a name that ends in .nii.gz")
        else:
            files = ResultFiles(path, result_names([self.header.path])[0])
        files.folder.mkdir(parents=True, exist_ok=True)
        files.check({self.header.path.resolve()}, overwrite=overwrite)
        self.write(files, overlay=overlay)
        found = (files.label_map, files.description, files.overlay, files.probabilities)
        return [file for file in found if file.exists()]

    def write(self, files: ResultFiles, *, overlay: bool) -> str:
        """Write label map, description and requested files; returns lines for the terminal."""
        written = list(self.written)
        if self.steps is not None:
            self.steps.save(files.probabilities)
            written.append(files.probabilities)
        if overlay:
            if self.draw is None:
                raise ValueError("a session draws no picture; save without overlay")
            self.draw(files.overlay, files.name)
            written.append(files.overlay)
        files.remove_others(written)
        write_label_map(files.label_map, self.label_map, self.header)
        files.describe({**self.about, "warnings": self.warnings, self.kind: self.rows})
        text = f"{printable(files.label_map)}: {self.text}"
        return with_warnings(text, self.header.path.name, self.warnings)


# ------------------------------------------------------------------ class volumes


def count_voxels(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Voxels of every class in label (I, J, K), (num_classes,) int64."""
    planes = label.transpose(2, 1, 0)  # as they lie in memory; bincount makes eight bytes of each
    return sum(np.bincount(plane.ravel(), minlength=num_classes) for plane in planes)


def measured(voxels: int, voxel_ml: float | None) -> dict[str, Any]:
    """A class's voxels and volume_ml, for a description; None where a voxel's volume is unknown."""
    volume = None if voxel_ml is None else round(int(voxels) * voxel_ml, 4)
    return {"voxels": int(voxels), "volume_ml": volume}


def measured_text(row: Mapping[str, Any]) -> str:
    """A class for the terminal: liver 1402.5 ml, or its voxels where their volume is unknown."""
    if row["volume_ml"] is None:
        return f"{printable(row['name'])} {counted(row['voxels'], 'voxel')}"
    return f"{printable(row['name'])} {row['volume_ml']:.1f} ml"


def with_warnings(text: str, scan: str, warnings: Iterable[str]) -> str:
    """A text for the terminal with a further line for each warning about the file `scan`."""
    return "\n".join([text, *(f"  warning: {printable(scan)}: {warning}" for warning in warnings)])
