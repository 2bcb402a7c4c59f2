"""Drawn data: phantoms of a pelvis and a belly, and CT drawn over real label maps."""
