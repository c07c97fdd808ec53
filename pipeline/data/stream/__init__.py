"""Batches read ahead of the step, the same on all ranks, without the shards that are skipped."""
