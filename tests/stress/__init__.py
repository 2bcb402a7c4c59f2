"""Faults injected by the thousand: kills while saving, broken files, dying ranks, stopped runs.

`python -m tests.stress` runs the full counts and prints them; tests/test_stress.py runs samples.
"""
