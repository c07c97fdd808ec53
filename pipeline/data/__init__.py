"""From a cache to batches: the order of training samples is arithmetic, the state one integer.

`source` (what is read), `mapped` and `retokenise` (for students of another vocabulary), `collate`
(to torch) at a `temperature`, `heldout`; `order/` (which rows make step i, and which of them are a
rank's), `stream/` (steps read ahead, the same on all ranks).
"""
