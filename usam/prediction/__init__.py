"""Segmenting scans: prompts a user gives, windows over volumes, and the files that are written."""
