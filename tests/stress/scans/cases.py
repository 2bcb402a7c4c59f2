"""What a case of this part is: a scan to be made in a folder, and whether it is sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A scan. make: writes it into a folder and gives its path; sound: it must be read."""

    name: str
    sound: bool
    make: Callable[[Path], Path]
