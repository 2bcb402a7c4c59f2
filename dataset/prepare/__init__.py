"""python -m dataset.prepare: raw scans into a store of slices or volumes."""
