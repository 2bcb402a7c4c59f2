"""Segmenting scans: user prompts, windows over volumes, and output files."""
