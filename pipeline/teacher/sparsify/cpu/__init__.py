"""The reduction of logits on a CPU: loops over a row, compiled by numba."""
