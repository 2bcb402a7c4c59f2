"""Data for training and evaluation: slices in, uint8 tensors out."""
