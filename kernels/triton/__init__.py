"""Triton kernels, one file per op, under the op's own name. They import torch and triton alone.

``tuning`` is not an op: it chooses the kernels' tiles.
"""
