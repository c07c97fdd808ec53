"""Rows of any source: hub data sets, files and folders, the embedded corpus."""
