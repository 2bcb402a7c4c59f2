"""The scans of --annotate, their states, and the label names they share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.files import write_json
from dataset.palette import PALETTE
from usam.prediction.results import result_names

STATES = ("open", "done", "skipped")
MAX_LABELS = 100
MAX_NAME = 60  # characters
FILE = "annotation.json"


@dataclass
class WorkList:
    """Scans by name, their states, and a name and colour for each label id.

    folder: where everything is written; the label maps lie in its `labels`, each named as its scan,
    so that `dataset.prepare --labels` finds them.
    """

    folder: Path
    scans: dict[str, Path]
    states: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    colors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, scans: Sequence[Path], classes: Sequence[str] = ()) -> WorkList:
        """The work list of `scans`, restored from `folder`; `classes` name the labels of a new one.

        Raises ValueError for a damaged list.
        """
        work = cls(folder, dict(zip(result_names(scans), scans, strict=True)))
        work.labels_folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                work.states = {name: str(s) for name, s in content["scans"].items() if s in STATES}
                for row in content["labels"]:
                    work.name(int(row["label"]), row["name"], row["color"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: cannot be read ({error}); move it away") from None
        elif classes:
            for label, name in enumerate(classes, start=1):
                work.name(label, name)
        if not work.names:
            work.name(1, "object")
        return work

    @property
    def labels_folder(self) -> Path:
        """The folder of the label maps."""
        return self.folder / "labels"

    def label_map(self, scan: str) -> Path:
        """The label map of a scan."""
        return self.labels_folder / f"{scan}.nii.gz"

    def marks(self, scan: str) -> Path:
        """The file of a scan's marks, for the next session."""
        return self.folder / f"{scan}_marks.json"

    def prompts(self, scan: str) -> Path:
        """The file of a scan's prompts, for --predict."""
        return self.folder / f"{scan}_prompts.json"

    def name(self, label: int, name: Any, color: Any = None) -> None:
        """Name a label and give it a colour; ValueError for a name in use, or none."""
        if not 1 <= label <= MAX_LABELS:
            raise ValueError(f"label {label}: at most {MAX_LABELS} are supported")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError("a label needs a name")
        name = " ".join(name.split())[:MAX_NAME]
        if any(other == name and number != label for number, other in self.names.items()):
            raise ValueError(f"another label is named {name}")
        default = self.colors.get(label, PALETTE[(label - 1) % len(PALETTE)])
        color = default if color is None else color
        is_color = isinstance(color, str) and len(color) == 7 and color[0] == "#"
        if not is_color or not set(color[1:].lower()) <= set("0123456789abcdef"):
            raise ValueError(f"color {color!r:.20}: expected #rrggbb")
        self.names[label], self.colors[label] = name, color

    def add(self, name: Any = None) -> int:
        """A new label's id."""
        label = max(self.names, default=0) + 1
        self.name(label, f"object {label}" if name is None else name)
        return label

    def save(self) -> None:
        """Write states and names."""
        rows = [
            {"label": label, "name": name, "color": self.colors[label]}
            for label, name in sorted(self.names.items())
        ]
        write_json(self.folder / FILE, {"program": "u-sam.py", "scans": self.states,
                                        "labels": rows})  # fmt: skip
