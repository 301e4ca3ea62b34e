"""Triton kernels, one file an op, under the op's own name. They import torch and triton alone.

``tuning`` is no op: it chooses their tiles.
"""
