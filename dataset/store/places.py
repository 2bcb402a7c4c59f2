"""Where packed data goes: beside the release where that may be written, else the user's cache.

The sources that pack on first use (CARE, SAM-Med3D's layout) ask here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def packed_places(roots: Sequence[Path], digest: str) -> list[Path]:
    """Folders a packed store of this digest may lie in: `packed` in the only root, the cache."""
    beside = [roots[0] / "packed"] if len(roots) == 1 else []
    return [*beside, cache() / digest[:16]]


def packed_place(roots: Sequence[Path], digest: str) -> Path:
    """The folder to pack into; its parent exists."""
    places = packed_places(roots, digest)
    place = places[0] if len(roots) == 1 and writable(roots[0]) else places[-1]
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def writable(folder: Path) -> bool:
    """Whether new files may go there; a folder without any write bit is meant to stay as it is."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "u-sam"
