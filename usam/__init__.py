"""U-SAM and SAM-Med3D: networks, training, evaluation and prediction.

    import usam
    model = usam.load("best.pth")
    result = model.predict("scan.nii.gz")

The names of `usam.api` are imported, and PyTorch with them, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from usam.api import Model, Session, load

__all__ = ["Model", "Session", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'usam' has no attribute {name!r}")
    from usam import api

    return getattr(api, name)
