"""The Python interface: what `from pipeline import ...` gives, for notebooks and other trainers.

`settings` (of both stages), `runs` (the stages as functions, each in a process of its own),
`results` (what they return), `dataset` (a cache as batches of torch tensors), `targets` (the
teacher's part of a batch), `sparse_kl` (the loss of such a batch).
"""
