"""Finds labelled volumes: SAM-Med3D's own layout, nnU-Net, WORD, AMOS or plain pairs.

`dataset.prepare volumes` and `--dataset volumes` list their cases here; nothing is read but names
and dataset.json.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dataset.prepare.sources import (
    SPLIT_FOLDERS,
    Source,
    class_table,
    find_folder,
    find_nnunet,
    find_word,
    paired_splits,
    with_splits,
)

LAYOUT = "ROOT/CLASS/MODALITY_DATASET/{imagesTr,labelsTr}"
AMOS = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach"),
    *("aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum"),
    *("bladder", "prostate or uterus"),
)


def is_layout(root: Path) -> bool:
    """Whether a folder follows SAM-Med3D's layout: splits two folders down, none above."""
    return root.is_dir() and bool(_leaves(root)) and with_splits(root) is None


def patient_of(case_id: str) -> str:
    """The patient of a case: in SAM-Med3D's layout, its id without the class."""
    return case_id.split("/", 1)[-1]


def class_of(case_id: str) -> str:
    """The class folder of a case in SAM-Med3D's layout."""
    return case_id.split("/", 1)[0]


def find_volumes(
    roots: Sequence[Path],
    *,
    labels: Path | None = None,
    channel: int | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """The cases of one data set, or of several roots in SAM-Med3D's layout, sorted.

    labels: the folder of labels where the only root holds the images; classes names the labels
    1, 2, ... where nothing else does. In SAM-Med3D's layout a case is one binary label, its id
    CLASS/MODALITY_DATASET/NAME and its class a folder. Raises FileNotFoundError for folders of
    another layout, ValueError for roots that do not mix.
    """
    missing = [root for root in roots if not root.is_dir()]
    if missing:
        raise FileNotFoundError(f"volumes: no folder {missing[0]}; pass --input")
    if labels is None and all(is_layout(root) for root in roots):
        if classes:
            raise ValueError(f"volumes: {LAYOUT} names its classes; leave out --classes")
        source = _find_layout(roots, channel)
    elif len(roots) > 1:
        other = next(root for root in roots if not is_layout(root))
        raise ValueError(f"volumes: several --input must be {LAYOUT}; prepare {other} alone")
    else:
        source = _find_other(roots[0], labels, channel, classes)
    order = {"train": 0, "val": 1, "test": 2}
    return replace(source, cases=sorted(source.cases, key=lambda c: (order[c.split], c.id)))


def _find_layout(roots: Sequence[Path], channel: int | None) -> Source:
    source = Source("layout", roots[0], None, [])
    for root in roots:
        for leaf in _leaves(root):
            found = paired_splits(Source("layout", leaf, None, []), channel)
            place = f"{leaf.parent.name}/{leaf.name}"
            source = replace(
                source,
                cases=source.cases + [replace(c, id=f"{place}/{c.id}") for c in found.cases],
                unlabelled=source.unlabelled + found.unlabelled,
                unmatched=source.unmatched + found.unmatched,
            )
    if not source.cases:
        raise FileNotFoundError(f"volumes: no labelled scan in {roots[0]}; expected {LAYOUT}")
    names = sorted({class_of(case.id) for case in source.cases})
    return replace(source, classes=class_table(names))


def _leaves(root: Path) -> list[Path]:
    """The folders CLASS/MODALITY_DATASET of a root that hold imagesTr or the like."""
    ends = [f"images{end}" for end in SPLIT_FOLDERS]
    return sorted({path.parent for end in ends for path in root.glob(f"*/*/{end}")})


def _find_other(
    root: Path, labels: Path | None, channel: int | None, classes: Sequence[str] | None
) -> Source:
    if labels is not None or (root / "images").is_dir():
        return find_folder(root, labels, channel, classes)
    if (root / "dataset.json").is_file():
        return find_nnunet(root, channel)
    found = with_splits(root)
    if found is None:
        raise FileNotFoundError(
            f"volumes: no scans in {root}; expected {LAYOUT}, nnU-Net (dataset.json), imagesTr"
            " and labelsTr, images and labels, or --labels"
        )
    if (found / "dataset.json").is_file():
        return find_nnunet(found, channel)
    source = paired_splits(Source("folder", found, None, []), channel)
    if not source.cases:
        raise FileNotFoundError(f"volumes: no scan in {found} has a label of its name")
    if classes:
        return replace(source, classes=class_table(classes))
    if all(re.match(r"word_\d", case.id) for case in source.cases):
        return find_word(found, channel)
    if all(re.match(r"amos_\d", case.id) for case in source.cases):
        return replace(source, name="amos", classes=class_table(AMOS))
    return source
