"""The distillation loss: sparse divergences, computed inside the student's head.

`settings` (no torch), `types` (what goes in and out), `weights` (teacher at a temperature),
`divergence` ([N, K] arithmetic), `sparse_kl` (a chunk of logits, in place), `fused` (chunks and
matrix products), `head` (the module), `reference` (dense float64, for tests).
"""
