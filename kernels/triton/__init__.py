"""Triton kernels, one file per op, named after the op. They import only torch and triton.

``tuning`` is not an op: it chooses the tiles of the kernels.
"""
