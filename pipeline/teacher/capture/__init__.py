"""The teacher's distributions over a corpus: plan, identity, the worker that fills the cache."""
