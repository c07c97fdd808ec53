"""What the head does on a GPU alone: sizes of chunks, aligned products, few kernels.

`chunks` is arithmetic without torch, which forecasts use as well; `products` sums a 16-bit weight's
gradient in float32; `compiled` fuses the [N, K] operations. On a CPU nothing of this runs.
"""
