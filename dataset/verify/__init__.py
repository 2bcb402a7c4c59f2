"""python -m dataset.verify: what is wrong or unusual in a data set, raw or prepared."""
