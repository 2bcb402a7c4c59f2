"""WORD (16 abdominal organs in CT), read from the slice store `dataset.prepare word` makes.

`build_dataset` opens it; as published, the rim of a slice is cut off and training draws from slices
with an organ in them.
"""

from __future__ import annotations

from pathlib import Path

from dataset.store.slices import SliceStore

ORGANS = (
    "liver",
    "spleen",
    "left kidney",
    "right kidney",
    "stomach",
    "gallbladder",
    "oesophagus",
    "pancreas",
    "duodenum",
    "colon",
    "intestine",
    "adrenal",
    "rectum",
    "bladder",
    "left femoral head",
    "right femoral head",
)
NUM_CLASSES = 1 + len(ORGANS)
CROP = 60 / 512  # of the side, at each edge: 60 pixels of the released 512 x 512


def open_store(data_root: Path | str) -> SliceStore:
    """The WORD slice store in `data_root`.

    Raises FileNotFoundError if there is none, ValueError if its class table is not WORD's 17.
    """
    root = Path(data_root)
    if not (root / "index.json").is_file():
        raise FileNotFoundError(
            f"word: no slice store in {root}; make it with"
            f" python -m dataset.prepare word --input WORD-V0.1.0 --output {root},"
            " or try --dataset phantom"
        )
    store = SliceStore(root)
    if len(store.classes) != NUM_CLASSES:
        raise ValueError(
            f"word: {root} holds {len(store.classes)} classes, WORD has {NUM_CLASSES};"
            " for another store use --dataset store"
        )
    return store
