"""Scores of a trained model: overlap, surface distances, clicks, and the reports made of them."""
