"""Which entries are kept and on which grid.

The inclusion-probability rule, quantisation, counter-based noise.
"""
