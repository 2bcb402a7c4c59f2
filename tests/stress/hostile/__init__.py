"""Broken and hostile input files: payloads, mutations, and what must refuse them."""
