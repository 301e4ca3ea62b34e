"""Operations that the host dispatches per batch of the engine and per call of ``attribute``, beside the model's own.

    python -m bench.dispatches [--images 4] [--depth 12]

A device that is faster than the host waits for each of them. Their number depends neither on the width of the model nor
on the device, so a narrow model on a CPU tells it. ``read back``: operations that wait for the device, if the tensor is
there. ``ms``: the host's time.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastfg
from bench.photographs import photographs
from fastfg.models.timm import import_timm
from fastfg.perturb.engine import Engine
from fastfg.perturb.tokens import Tokens

WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")


class Dispatched(TorchDispatchMode):
    """Counts the operations inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def waits(self) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith(WAITS))


def dispatched(run: Callable[[], Any]) -> tuple[int, int, float]:
    """Operations, those that read back, and the host's milliseconds (the best of three, without counting)."""
    with Dispatched() as mode:
        run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return mode.total, mode.waits, 1000 * min(seconds)


def evaluation(model: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    """Operations and waits: per batch in the model, per batch around it, and per image outside of batches."""
    maps = fastfg.attribute(model, images, target=1).maps
    batches, model_ops, read_ops = 0, Counter[str](), Counter[str]()
    waits: Counter[str] = Counter()
    run, read = Tokens.run, Engine.read

    def counted_run(tokens: Tokens, inputs: Any) -> Any:
        nonlocal batches
        batches += 1
        with Dispatched() as mode:
            output = run(tokens, inputs)
        model_ops.update(mode.counts)
        waits["run"] += mode.waits
        return output

    def counted_read(*args: Any, **kwargs: Any) -> Any:
        with Dispatched() as mode:
            found = read(*args, **kwargs)
        read_ops.update(mode.counts)
        waits["read"] += mode.waits
        return found

    with (
        patch.object(Tokens, "run", counted_run),
        patch.object(Engine, "read", counted_read),
        Dispatched() as everything,
    ):
        fastfg.evaluate(model, images, maps, target=1, keys=range(len(images)), path="tokens")
    total, around = everything.total, read_ops.total() - model_ops.total()
    return {
        "evaluate: per batch, in the model": (model_ops.total() / batches, waits["run"] / batches),
        "evaluate: per batch, around it": (around / batches, (waits["read"] - waits["run"]) / batches),
        "evaluate: per image, outside of batches": (
            (total - read_ops.total()) / len(images),
            (everything.waits - waits["read"]) / len(images),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--depth", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = {"embed_dim": 24, "depth": arguments.depth, "num_heads": 2, "num_classes": 10}
    model = import_timm().create_model("vit_tiny_patch16_224", **shape).eval().requires_grad_(False)
    images = photographs(arguments.images, 224)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def both() -> None:
        given = images.clone().requires_grad_()
        model(given)[:, 1].sum().backward()

    gate = fastfg.Gate((2, 3, 4), score="gradient_x_residual")
    calls = {
        "the model: forward": forward,
        "the model: forward and backward": both,
        "attribute: vanilla": lambda: fastfg.attribute(model, images, target=1),
        "attribute: one gate": lambda: fastfg.attribute(model, images, gate=gate, target=1),
    }
    print(f"{'':<42}{'operations':>12}{'read back':>12}{'ms':>8}")
    for name, call in calls.items():
        n, waits, ms = dispatched(call)
        print(f"{name:<42}{n:>12}{waits:>12}{ms:>8.1f}")
    for name, (per, waits_per) in evaluation(model, images).items():
        print(f"{name:<42}{per:>12.1f}{waits_per:>12.2f}")


if __name__ == "__main__":
    main()
