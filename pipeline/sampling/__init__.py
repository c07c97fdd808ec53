"""Which entries are kept, and how their values are quantised.

The inclusion-probability rule, quantisation, counter-based noise.
"""
