"""The reduction of logits on a GPU: Triton kernels, and compiled chains where they do not serve."""
