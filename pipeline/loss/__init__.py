"""The distillation loss: sparse divergences, computed inside the student's head.

The gradient on the logits is written in `chunk_gradient` (`chunk_gradient_triton` on a GPU), from
the gradient on the kept entries that `entry_gradient` computes; `divergence` has the derivatives of
each divergence.

Settings: `settings` (no torch), `spec`. Input and output: `targets`. The teacher at a temperature:
`teacher_weights` (exact entries), `sampled_divergence` (estimated from sampled entries). Around the
gradient: `fused` (chunks and matrix products), `head` (the module), `gpu` (what differs on a GPU).
Other vocabularies: `uld`. Dense float64 definitions, for tests: `reference`.

"""
