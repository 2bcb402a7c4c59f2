"""Interactive segmentation: sessions on a scan, the server for viewers, and the browser page."""
