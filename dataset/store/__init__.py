"""Prepared data on disk: memory-mapped slices and volumes with an index."""
