"""Triton kernels, one file an op, under the op's own name. They import torch and triton alone."""
