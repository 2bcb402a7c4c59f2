"""Scans of three kinds of formats, each with one field of its header changed."""
