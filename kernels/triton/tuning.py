"""Choose the tiles of a kernel. By default they are fixed, so results are bitwise equal on machines with the same GPU.

A kernel has a few configurations. The first is the default; ``FIXED`` names the one that was measured to be the fastest
on a device. ``FASTFG_TUNE=1`` times all configurations once per kernel, device, dtype and shape (sizes rounded up to
powers of two), and stores the fastest in ``$FASTFG_CACHE/tuned.json`` (~/.cache/fastfg). ``FASTFG_TUNE=cached`` uses
that file and times nothing.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

Config = dict[str, Any]  # tile sizes, num_warps, num_stages, maxnreg; "cards": the capabilities that it is offered for
MODES = ("0", "1", "cached")
HOPPER = 9  # the first number of its compute capability

FIXED: dict[str, Config] = {}  # by "kernel, device, dtype"; filled from measurements
_writing = threading.Lock()


def choose(
    kernel: str, like: Tensor, sizes: Sequence[int], candidates: list[Config], run: Callable[[Config], object]
) -> Config:
    """The configuration among ``candidates`` for tensors like ``like``. ``run(configuration)`` does the work."""
    mode = os.environ.get("FASTFG_TUNE") or "0"
    if mode not in MODES:
        raise ValueError(f"FASTFG_TUNE: expected one of {MODES}, got {mode!r}")
    if not like.is_cuda:  # interpreted or only compiled: times mean nothing
        return offered(candidates)[0]
    card, capability = device(like.device)
    offers = offered(candidates, capability)
    key = f"{kernel}, {card}, {str(like.dtype).removeprefix('torch.')}"
    chosen = FIXED.get(key)
    if mode != "0":
        key += "".join(f", {triton.next_power_of_2(n)}" for n in sizes)
        found = kept(cache_file()).get(key)
        if mode == "1" and found not in offers and not torch.cuda.is_current_stream_capturing():
            found = min(offers, key=lambda config: seconds(lambda: run(config)))
            keep(cache_file(), key, found)
        chosen = found or chosen
    return chosen if chosen in offers else offers[0]  # an older version may have stored one that no longer exists


def offered(candidates: list[Config], capability: int = HOPPER) -> list[Config]:
    """The candidates for GPUs of this compute capability, without their ``cards`` entry."""
    here = [config for config in candidates if capability in config.get("cards", (capability,))]
    return [{name: value for name, value in config.items() if name != "cards"} for config in here]


def seconds(run: Callable[[], object]) -> float:
    """The median time of some runs; infinite if a smaller GPU of this capability has too little shared memory."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3
    except triton.runtime.errors.OutOfResources:
        return float("inf")


@functools.cache
def device(where: torch.device) -> tuple[str, int]:
    """The device's name, and the major version of its compute capability."""
    return torch.cuda.get_device_name(where), torch.cuda.get_device_capability(where)[0]


@functools.cache
def multiprocessors(where: torch.device) -> int:
    """How many a GPU has; 1 on the CPU, so that the interpreter runs whole loops of persistent programs."""
    return torch.cuda.get_device_properties(where).multi_processor_count if where.type == "cuda" else 1


def cache_file() -> Path:
    return Path(os.environ.get("FASTFG_CACHE") or "~/.cache/fastfg").expanduser() / "tuned.json"


@functools.cache
def kept(path: Path) -> dict[str, Config]:
    """The choices of earlier searches. Warns about a file that can't be read, and treats it as empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {type(found).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: not used, and written anew by FASTFG_TUNE=1: {error}", stacklevel=2)
        return {}
    return found


def keep(path: Path, key: str, config: Config) -> None:
    """Add a choice to the file. Threads and processes may write at once; readers see a complete file, old or new.

    If two processes write at the same moment, one choice may be lost. It is then searched for again.
    """
    with _writing:
        kept.cache_clear()
        found = kept(path) | {key: config}
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{uuid.uuid4().hex}")
        written.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        written.replace(path)
        kept.cache_clear()
