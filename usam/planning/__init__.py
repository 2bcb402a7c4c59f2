"""--recipe auto: a training's settings, planned from its data, its device and its time."""
