"""A micro-batch through the student's body: packed or one by one, tried before training."""
