"""Peak memory of ``fastfg.attribute`` without gates, as the number of tokens N grows.

On a CPU the peak comes from the allocator's events. ``bench_attribute`` measures the times.
"""

import os
from dataclasses import replace

from bench import bench_attribute
from bench.suite import Case

MAPS_IN_MEMORY = 3.5  # sizes of all maps, measured: maps, their gradients, and what softmax saves


def not_enough_memory(case, device):
    """Why the case does not fit into the CPU's memory; a CUDA device raises an error itself."""
    if device == "cuda":
        return None
    maps = 12 * case.B * (case.d // 64) * (case.grid**2 + 1) ** 2 * 4 * MAPS_IN_MEMORY
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None if maps < 0.8 * there else f"it needs about {maps / 2**30:.0f} GiB"


def vit(d, B, dtype, *sizes):
    return [
        Case({"C": 0, "B": B, "N": grid**2 + 1, "patch": patch, "grid": grid, "d": d}, dtype) for patch, grid in sizes
    ]


TOKENS = [(16, 14), (16, 28), (14, 37), (16, 64)]  # 197, 785, 1,370 and 4,097
KEPT, AUTHOR = "eager, kept maps", "the author's way"
PROVIDERS = {name: provider for name, provider in bench_attribute.SUITE.providers.items() if name != AUTHOR}
SUITE = replace(
    bench_attribute.SUITE,
    name="memory",
    small=vit(384, 2, "float32", TOKENS[0], (16, 24)),
    full=[*vit(384, 2, "float32", *TOKENS), *vit(768, 16, "bfloat16", TOKENS[0], TOKENS[-1])],
    providers=PROVIDERS | {KEPT: replace(PROVIDERS[KEPT], why_not=not_enough_memory)},
    timed=False,
)


def test_memory(bench, case, provider):
    bench(SUITE, case, provider)
