"""What any run needs around a model: processes, devices, loaders, signals, progress, figures."""
