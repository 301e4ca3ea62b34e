"""Check that a target function looks at each row of the model's output alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfg.targets import Function, map_tensors


def check_row_by_row(target: Function, output: Any, n: int) -> None:
    """Raise ValueError where ``target`` does more than look at each of the ``n`` rows of ``output`` alone.

    Evaluation calls it with rows of many images in any number and order, so it can't hold one value per image.
    """
    value = target.value(output, n)
    if n == 1:  # a second row, so that there is another one to depend on
        output = map_tensors(output, lambda t: torch.cat([t, 0.5 * t]) if t.ndim and len(t) == 1 else t)
        n, alone, value = 2, value, _for_any_rows(target, output, 2)
        _check_same(value[:1], alone)
    order = [*range(n - 1, -1, -1), 0]
    other = map_tensors(output, lambda t: t[order] if t.ndim and len(t) == n else t)
    _check_same(_for_any_rows(target, other, len(order)), value[order])


def _for_any_rows(target: Function, output: Any, n: int) -> Tensor:
    try:
        return target.value(output, n)
    except Exception as error:  # whatever the user's function raises for another number of rows
        raise ValueError(f"target: expected a function that takes any number of rows, got {error}") from error


def _check_same(again: Tensor, value: Tensor) -> None:
    if not torch.allclose(again, value, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            "target: expected a function of each row of the output alone, got one whose value for an image "
            "depends on the other rows or on their order"
        )
