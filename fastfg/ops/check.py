"""Argument checks for the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg.reference.relevancy import IDENTITIES


def check_shapes(sizes: dict[str, int], **arguments: tuple[Tensor | None, str]) -> None:
    """Check the shape of each argument against its letters and the ``sizes`` known so far.

    An argument is a pair of a tensor and its letters, for example ``g=(g, "T d")``. A new letter takes its size from
    the tensor. Raises ValueError that names the argument.
    """
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        dims = letters.split()
        known = [sizes.get(letter) for letter in dims]
        fits = tensor.ndim == len(dims) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(dims, tensor.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(
                letter if size is None else str(size) for letter, size in zip(dims, known, strict=True)
            )
            raise ValueError(f"{name}: expected [{expected}] ({letters}), got {list(tensor.shape)}")


def check_indices(indices: Tensor, F: int, name: str = "indices") -> None:
    """Raise IndexError for a feature that the decoder does not have.

    For the reference, which may wait for a GPU: torch's own check there is an assertion that ends the whole process's
    use of the GPU. A traced program can't depend on values.
    """
    if indices.is_meta or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    for extreme in map(int, indices.aminmax()):
        if not 0 <= extreme < F:
            raise IndexError(f"{name}: expected features from 0 to {F - 1}, got {extreme}")


def check_identity(identity: str) -> None:
    if identity not in IDENTITIES:
        raise ValueError(f"identity: expected one of {IDENTITIES}, got {identity!r}")


def check_rows(rows: Tensor) -> None:
    """Raise ValueError for rows in a dtype that is too imprecise for sums over all blocks."""
    if rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rows: expected float32 or float64, for a model of any dtype, got {rows.dtype}")


def widest(rows: Tensor, q: Tensor) -> torch.dtype:
    """The wider of the two dtypes: rows may be float64 even if the model is not."""
    return rows.dtype if rows.dtype == torch.float64 else q.dtype
