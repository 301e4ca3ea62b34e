"""Triton kernels, one file per op, named after the op. They import only torch and triton.

``tuning`` and ``selection`` are not ops: the first chooses the tiles of the kernels, the second is part of
``encode_topk``.
"""
