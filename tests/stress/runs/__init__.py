"""Tiny training runs as processes, and what interrupts them."""
