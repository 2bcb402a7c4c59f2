"""Tests of usam/planning."""
