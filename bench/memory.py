"""Peak memory of ``fastfg.attribute`` beside the model's own forward and backward, as the number of tokens grows.

    python bench/memory.py [--device cuda] [--json FILE]

ViT-S, batch 2. "kept maps" is what an attribution costs that keeps every block's attention and its gradient. On a CPU
the allocator's own events are added up (torch.profiler); on a GPU its peak is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fastfg
from fastfg.models.timm import import_timm

SIDES = {197: (16, 14), 785: (16, 28), 1370: (14, 37), 4097: (16, 64)}  # tokens: (patch, grid)
MIB = 2**20


def peak(run: Callable[[], object], device: str) -> int:
    """Largest number of bytes that were allocated at a time during ``run``, above those before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def own(model: nn.Module, images: torch.Tensor) -> None:
    """The model's forward and the backward of its activations."""
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(model(leaf).amax(1).sum(), leaf)


def kept_maps(model: nn.Module, images: torch.Tensor) -> None:
    """TransMM as it is usually written: unfused attention, all maps and their gradients."""
    maps: list[torch.Tensor] = []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda m, i, o: maps.append(o)) for block in model.blocks]
    for block in model.blocks:
        block.attn.fused_attn = False
    try:
        gradients = torch.autograd.grad(model(images.clone().requires_grad_()).amax(1).sum(), maps)
        rows = torch.zeros(len(images), maps[0].shape[-1], device=images.device)
        rows[:, 0] = 1
        for attn, gradient in zip(reversed(maps), reversed(gradients), strict=True):
            rows = rows + torch.einsum("bn,bnm->bm", rows, (attn * gradient).clamp(min=0).mean(1))
    finally:
        for hook in hooks:
            hook.remove()
        for block in model.blocks:
            block.attn.fused_attn = True


def measure(tokens: int, device: str, kept_up_to: int) -> dict[str, float]:
    patch, grid = SIDES[tokens]
    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", patch_size=patch, img_size=patch * grid, num_classes=10)
    model = model.eval().requires_grad_(False).to(device)
    images = torch.randn(2, 3, patch * grid, patch * grid, device=device)
    runs = {
        "own": lambda: own(model, images),
        "attribute": lambda: fastfg.attribute(model, images),
        "kept maps": lambda: kept_maps(model, images),
    }
    if tokens > kept_up_to:
        del runs["kept maps"]
    return {"N": tokens} | {name: peak(run, device) / MIB for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kept-up-to", type=int, default=2000, help="tokens; 4,097 take about 40 GB to keep the maps")
    parser.add_argument("--json", type=Path, help="append a line a size to this file")
    arguments = parser.parse_args()
    print("|    N | own forward + backward | attribute | above it | kept maps |   (MiB)")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for tokens in SIDES:
        row = measure(tokens, arguments.device, arguments.kept_up_to)
        extra = row["attribute"] - row["own"]
        kept = f"{row['kept maps']:.0f}" if "kept maps" in row else "not run"
        print(f"| {tokens} | {row['own']:.0f} | {row['attribute']:.0f} | {extra:+.0f} | {kept} |", flush=True)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(row | {"device": arguments.device, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
