"""Yardsticks from the literature in miniature: `make bench-yardsticks`."""
