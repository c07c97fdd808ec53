"""Logits to columns on the device, columns to sparse targets on the host."""
