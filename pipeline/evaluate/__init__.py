"""Held-out measures of a student against the cached teacher, with standard errors."""
