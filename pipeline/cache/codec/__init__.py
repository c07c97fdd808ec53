"""Sparse targets to bytes and back.

The codec, its kernels, its arrow columns, subsampling without decoding.
"""
