"""U-SAM's network under its earlier import path."""

from usam.models.usam import USam, build_usam

__all__ = ["USam", "build_usam"]
