"""Everything around a model: processes, devices, loaders, signals, progress bars, figures."""
