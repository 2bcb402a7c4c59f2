"""The race on real patients: U-SAM and its peers at equal wall time, in one table.

What is drawn, timed on other grounds or measured without labels is in the folder above.
"""
