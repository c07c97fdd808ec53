"""The teacher's distributions over a corpus: plan, identity, the loop that fills the cache."""
