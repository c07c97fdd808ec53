"""Sparse targets to bytes and back.

The codec, its kernels, its Arrow columns, and subsampling without decoding.
"""
