"""The device that a command names."""

from __future__ import annotations

import torch


def usable_device(argument: str, name: str) -> torch.device:
    """The device called ``name``. A tensor is moved to it and back, to test that it works.

    Raises ValueError that names the ``argument`` and torch's reason.

    >>> usable_device("device", "cpu")
    device(type='cpu')
    """
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{argument}: expected one that torch can use here, got {name!r}: {reason}") from None
    return torch.device(name)
