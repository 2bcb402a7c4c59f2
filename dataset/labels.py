"""Which label ids are allowed: the one rule for preparing, checking and reading labels."""

from __future__ import annotations

import numpy as np

MAX_LABEL = 254  # of a class or an object; 255 means white in a mask, or "ignore"
CARE_IDS = (0, 1, 2, 3)  # of the CARE release: background, rectum, tumour, tumour again


def check_label_ids(label: np.ndarray, num_classes: int | None, where: object) -> None:
    """Raises ValueError, naming `where` and the ids, unless all ids are in the class table.

    label: any shape; num_classes counts the background, None where no names are given.
    """
    last = MAX_LABEL if num_classes is None else num_classes - 1
    if label.size == 0 or (label.min() >= 0 and label.max() <= last):
        return
    ids = np.unique(label)
    outside = ids[(ids < 0) | (ids > last)]
    table = f"0 to {MAX_LABEL}" if num_classes is None else f"the class table, 0 to {last}"
    binary = len(ids[ids != 0]) == 1 and (num_classes in (None, 2) or outside[0] == 255)
    advice = f"relabel {outside[0]:g} to 1" if binary else "relabel them"
    raise ValueError(f"{where}: label ids {listed(outside)} are outside {table}; {advice}")


def from_care(label: np.ndarray, where: object) -> np.ndarray:
    """A CARE label as class ids, uint8: 3 is tumour as 2 is. Raises ValueError for other ids."""
    known = np.isin(label, CARE_IDS)
    if not known.all():
        found = listed(np.unique(label[~known]))
        raise ValueError(f"{where}: label ids {found} are outside 0, 1, 2, 3; relabel them")
    return np.minimum(label, 2).astype(np.uint8)


def listed(ids: np.ndarray) -> str:
    """The first five ids as text."""
    return ", ".join(f"{float(value):.6g}" for value in ids[:5]) + (", ..." if len(ids) > 5 else "")
