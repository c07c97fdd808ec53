"""The commands of `python -m pipeline.cache`.

Verify, repair, slice, merge, export, stats.
"""
