"""The training loop, its engine, distributed set-up, checkpoints and resuming."""
