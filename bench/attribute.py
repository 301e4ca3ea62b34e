"""Time of ``fastfg.attribute`` beside the model's own forward and backward, and of a sweep beside one gate.

    python bench/attribute.py [--device cuda] [--batch 8] [--features 49152] [--json FILE]

ViT-B/16 at 224. Each pair runs in turn, A B A B; medians, and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fastfg
from fastfg.models.timm import import_timm

LAYERS = (2, 3, 4)


def clock(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(a: Callable[[], object], b: Callable[[], object], device: str, runs: int) -> tuple[float, float, float]:
    """Median seconds of a, of b, and the median of b / a pair by pair; one uncounted run of each first."""
    a()
    b()
    pairs = [(clock(a, device), clock(b, device)) for _ in range(runs)]
    ratios = [second / first for first, second in pairs]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs), statistics.median(ratios)


def own(model: nn.Module, images: torch.Tensor) -> None:
    """The model's forward and the backward of its activations."""
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(model(leaf).amax(1).sum(), leaf)


def random_sae(features: int, seed: int) -> fastfg.SparseAutoencoder:
    W = torch.randn(features, 768, generator=torch.Generator().manual_seed(seed))
    W = torch.nn.functional.normalize(W, dim=1)
    return fastfg.SparseAutoencoder(W.T.contiguous(), torch.zeros(features), W, torch.zeros(768), k=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--features", type=int, default=49152)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append a line a comparison to this file")
    arguments = parser.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    model = import_timm().create_model("vit_base_patch16_224").eval().requires_grad_(False).to(device)
    images = torch.randn(arguments.batch, 3, 224, 224, device=device)
    saes = {layer: random_sae(arguments.features, layer).to(device) for layer in LAYERS}
    one = fastfg.Gate(LAYERS)
    many = [fastfg.Gate(LAYERS, kappa, c) for kappa in (0.25, 0.5, 1) for c in (2, 5, 10, 20, 30, 40, 50, 80, 100)]
    comparisons = {
        "attribute / own forward + backward": (
            lambda: own(model, images),
            lambda: fastfg.attribute(model, images),
        ),
        "27 gates / 1 gate, 3 layers": (
            lambda: fastfg.attribute(model, images, saes=saes, gate=one),
            lambda: fastfg.attribute(model, images, saes=saes, gate=many),
        ),
    }
    for name, (a, b) in comparisons.items():
        first, second, ratio = in_turn(a, b, device, arguments.runs)
        print(f"{name}: {second:.3f} s / {first:.3f} s = {ratio:.3f}", flush=True)
        if arguments.json:
            line = {"name": name, "a": first, "b": second, "ratio": ratio, "batch": arguments.batch}
            with arguments.json.open("a") as file:
                file.write(json.dumps(line | {"device": device, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
