"""The distillation loss: sparse divergences, computed inside the student's head.

`settings` (no torch), `spec`, `types` (what goes in and out), `weights` and `sampled` (teacher at a
temperature, known and estimated), `divergence` and `rows` ([N, K] arithmetic), `sparse_kl` and
`triton_kl` (a chunk of logits, in place), `fused` (chunks and matrix products), `head` (the
module), `reference` (dense float64, for tests).
"""
