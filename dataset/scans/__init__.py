"""Reading a scan of any format, turning, windowing and resampling it, and writing labels on it."""
