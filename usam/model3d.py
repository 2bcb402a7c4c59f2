"""SAM-Med3D's network under its earlier import path."""

from usam.models.sam_med3d import SamMed3d, build_sam_med3d

__all__ = ["SamMed3d", "build_sam_med3d"]
