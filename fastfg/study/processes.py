"""Which of several processes this one is, as torchrun and job schedulers say it."""

from __future__ import annotations

import os
from typing import NamedTuple


class Place(NamedTuple):
    """``WORLD_SIZE``: the number of processes; ``RANK``: this one's number; ``LOCAL_RANK``: that on its machine."""

    world: int
    rank: int
    local_rank: int


def place() -> Place:
    """The place of this process, from the environment; without these variables, it is the only one.

    The process with rank 0 writes the report. So a rank that is missing would be that of every process, and one that
    is out of range that of none: both raise ValueError.
    """
    world, rank, local_rank = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if world == 0:
        raise ValueError("WORLD_SIZE: expected at least 1, got 0")
    if rank is None and (world or 1) > 1:
        raise ValueError(
            f"RANK: expected this process's number, 0 to {(world or 1) - 1}, as WORLD_SIZE is {world}, got none"
        )
    if rank and world is None:
        raise ValueError(f"WORLD_SIZE: expected the number of processes, as RANK is {rank}, got none")
    if rank and rank >= (world or 1):
        raise ValueError(f"RANK: expected 0 to {(world or 1) - 1}, as WORLD_SIZE is {world}, got {rank}")
    return Place(world or 1, rank or 0, local_rank or 0)


def _number(name: str) -> int | None:
    """The environment variable as an integer; None if it is not set, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name}: expected an integer of at least 0 in the environment, got {text!r}")
    return int(text)
