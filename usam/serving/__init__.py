"""Segmenting by clicks: sessions on one scan, the server that viewers connect to, its own page."""
