"""Reading scans: formats, headers, orientation, intensity windows, resampling, and the way back."""
