"""Caches that travel: pushed to the hub or to any store, pulled from there, compared on arrival."""
