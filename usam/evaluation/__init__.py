"""Scores of a trained model: overlap, surface distances, clicks, and their reports; no training."""
