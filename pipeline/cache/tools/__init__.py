"""What `python -m pipeline.cache` does to finished caches.

Verify, repair, slice, merge, export, stats.
"""
