"""Acceptance checks for the first GPU: what only a device can tell, with figures and limits."""
