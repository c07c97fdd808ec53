"""From a cache to batches: the order of training samples is arithmetic, the state one integer.

`settings` and `source` (what is read), `order` (hashes and permutations), `packing` (rows into
packs), `plan` (which packs make step i), `collate` (to torch), `stream` (steps, the same on all
ranks), `prefetch` and `read_ahead` (its threads), `left_out` (damaged shards), `heldout`.
"""
