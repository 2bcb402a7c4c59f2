"""Drawn data: phantoms of pelvis and abdomen, and CT drawn over real label maps."""
