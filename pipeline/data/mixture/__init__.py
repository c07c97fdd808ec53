"""Several caches as one: their shares of the batches, their rows, several teachers of one row.

`settings` (what a user names), `shares` (which pack is whose, by arithmetic), `rows` (rows of
several caches, or of several teachers), `caches` (opened, compared, and seen as one cache).
"""
