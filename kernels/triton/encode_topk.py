"""The K largest of ``(x - b_dec) @ W_enc + b_enc`` per token, then ReLU. The array [T, F] is never stored.

A value and its feature form one integer key (see ``selection``).

The features are processed in panels. The first panel fills the short list of each token. ``select`` cuts a list to its
K largest keys; the smallest of them is the token's threshold. The next panel appends the keys above the threshold,
about K m / n keys for a panel of m features after n others. So panels grow with the number of features before them, and
a few panels cover all features. The tiles of a panel are spread over F, so a panel is a fair sample for any order of
the features. If a list was still too short, ``select`` recomputes that token's panel exactly, in chunks of features.

Operations: ``2 T d F`` (one matrix product). Bytes: ``T d + d F`` elements read per pass of a tile, and about
``T K log(F / list)`` keys of 8 bytes written and read. The list takes at most 5% of ``4 T F`` bytes, or K and a tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .selection import LAST, bias, first_of, key_of, ordered_bits, put, select_kernel, sort_kernel

HIGHEST = tl.constexpr(2**63 - 1)
SHARE = 0.05  # of the 4 T F bytes that dense pre-activations would take
GOLDEN = (5**0.5 - 1) / 2
NEVER, ALWAYS = tl.constexpr(2**31 - 1), tl.constexpr(-(2**31))  # floors that no number, and every number, exceeds
PAST_THE_END = tl.constexpr(-0x7F800001)  # -infinity, in order

# For the filter: 16 rows per warp, so that each row lies within one warp. No configuration spills registers on its
# GPUs. float32 takes twice the memory and three products.
SINGLE = [
    {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
]
BULK = [  # "programs" per multiprocessor: one multiplies while the other chooses
    {
        "BLOCK_T": 128,
        "BLOCK_F": 128,
        "BLOCK_D": 64,
        "num_warps": 8,
        "num_stages": 3,
        "maxnreg": 128,
        "programs": 2,
        "cards": (9,),
    },
]
HALF = [  # the first runs two programs per multiprocessor
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_T": 64, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
]


@triton.jit
def halves(x):
    """The left and the right half of the columns, without moving them between registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def append(ordered, floor, list_ptr, at, f):
    """Store the keys above their row's floor from ``list_ptr + at`` on.

    A step stores 8 columns: two for each of 4 threads.
    """
    if ordered.shape[1] > 8:
        half: tl.constexpr = ordered.shape[1] // 2
        left, right = halves(ordered)
        at = append(left, floor, list_ptr, at, f)
        at = append(right, floor, list_ptr, at, f + half)
    else:
        even, odd = tl.split(tl.reshape(ordered, [ordered.shape[0], 4, 2]))
        f += 2 * tl.arange(0, 4)[None, :]
        keep = even > floor
        put(list_ptr + at, key_of(even, f), keep)
        at += keep.to(tl.int32)
        keep = odd > floor
        put(list_ptr + at, key_of(odd, f + 1), keep)
        at += keep.to(tl.int32)
    return at


@triton.jit
def keep_keys(
    pre, top, left, turn, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, F, CAPACITY, b_s,
    FILL: tl.constexpr, RAGGED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Append the pre-activations of one tile (without bias) that may be among the K largest to the lists.

    ``top`` and ``left`` are the tile's first token and feature.
    """
    row = tl.arange(0, BLOCK_T)
    t = top + row
    f = left + tl.arange(0, BLOCK_F)
    ordered = ordered_bits(pre + bias(b_ptr, f, F, b_s[0])[None, :])
    if RAGGED:  # past the end, the product with an infinite x is NaN
        ordered = tl.where((f < F)[None, :], ordered, PAST_THE_END)
    quarter = tl.arange(0, 4)  # the threads that share a row; each stores its keys next to each other
    if FILL:
        floor = tl.where(t < T, ALWAYS, NEVER)
        at = turn * BLOCK_F + (quarter * (BLOCK_F // 4))[None, :] + tl.zeros_like(t)[:, None]
    else:
        threshold = tl.load(threshold_ptr + t, mask=t < T, other=HIGHEST)
        # The threshold's feature is in another tile: an equal value here wins if this tile comes before that feature.
        floor = (threshold >> 32).to(tl.int32) - (left < LAST - (threshold & LAST)).to(tl.int32)
        keep = (ordered > floor[:, None]).to(tl.int32)
        number = tl.sum(tl.sum(tl.reshape(keep, [BLOCK_T, BLOCK_F // 8, 4, 2]), 3), 1)
        before = tl.sum(tl.where(quarter[None, :, None] < quarter[None, None, :], number[:, :, None], 0), 1)
        total = tl.sum(number, 1)
        # The order of the keys does not matter: the selection compares them.
        start = tl.atomic_add(count_ptr + t, total, mask=total > 0, sem="relaxed")
        floor = tl.where(start + total > CAPACITY, NEVER, floor)  # the count tells select that keys were dropped
        at = start[:, None] + before
    append(ordered, floor[:, None], keys_ptr + top.to(tl.int64) * CAPACITY, row[:, None] * CAPACITY + at, left)


@triton.jit(do_not_specialize=["first"])
def filter_kernel(
    x_ptr, W_ptr, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, D, F, CAPACITY, first, stride, tiles,
    x_s, W_s, b_s,
    FILL: tl.constexpr, RAGGED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute one tile of a panel, for any strides."""
    row = tl.program_id(0) * BLOCK_T
    t = row + tl.arange(0, BLOCK_T)
    left = first_of(first + tl.program_id(1), stride, tiles, BLOCK_F)
    f = left + tl.arange(0, BLOCK_F)
    x_at = x_ptr + t[:, None].to(tl.int64) * x_s[0]
    W_at = W_ptr + f[None, :].to(tl.int64) * W_s[1]
    pre = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for top in range(0, D, BLOCK_D):
        d = top + tl.arange(0, BLOCK_D)
        x = tl.load(x_at + d[None, :] * x_s[1], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        W = tl.load(W_at + d[:, None].to(tl.int64) * W_s[0], mask=(d < D)[:, None] & (f < F)[None, :], other=0.0)
        pre = tl.dot(x, W, pre, input_precision="tf32x3")
    keep_keys(
        pre, row, left, tl.program_id(1), b_ptr, keys_ptr, count_ptr, threshold_ptr, T, F, CAPACITY, b_s,
        FILL, RAGGED, BLOCK_T, BLOCK_F,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "last"])
def bulk_filter_kernel(
    x_desc, W_desc, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, D, F, CAPACITY, first, last, stride, tiles, b_s,
    TRANSPOSED: tl.constexpr, FILL: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute every n-th tile of a panel, for n programs, and read whole tiles with the bulk copy engine.

    The copies of a tile's first products start while the keys of the tile before are stored.
    """
    token_tiles = tl.cdiv(T, BLOCK_T)
    for tile in tl.range(tl.program_id(0), token_tiles * (last - first), tl.num_programs(0), flatten=True):
        turn, row = tile // token_tiles, tile % token_tiles * BLOCK_T
        left = first_of(first + turn, stride, tiles, BLOCK_F)
        pre = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        for top in range(0, D, BLOCK_D):
            x = x_desc.load([row, top])
            W = W_desc.load([left, top]).T if TRANSPOSED else W_desc.load([top, left])
            pre = tl.dot(x, W, pre)
        keep_keys(
            pre, row, left, turn, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, F, CAPACITY,
            b_s, FILL, RAGGED, BLOCK_T, BLOCK_F,
        )  # fmt: skip


def list_length(d: int, F: int, k: int, BLOCK_F: int, itemsize: int) -> int:
    """Keys that a token's list holds, in whole tiles: within SHARE, at least K and a tile, and at most all features."""
    spare = int(SHARE * 4 * F) - d * itemsize - 12  # bytes per token, less its x - b_dec, count and threshold
    tiles = max(min(spare // 8, 8 * k) // BLOCK_F, triton.cdiv(k, BLOCK_F) + 1)
    return min(tiles, triton.cdiv(F, BLOCK_F)) * BLOCK_F


def panels(F: int, k: int, capacity: int, BLOCK_F: int) -> list[tuple[int, int]]:
    """The first turn of each panel and the turn after its last; the first panel fills the lists.

    Of a panel of m features after n others, about k m / n are among the k largest so far. A panel is chosen to fill at
    most a quarter of a list's room. It has at most three times as many features as came before it, because the number
    of new keys varies more for a small k.
    """
    tiles, room = triton.cdiv(F, BLOCK_F), capacity - k
    edges = [0, capacity // BLOCK_F]
    while edges[-1] < tiles:
        n = edges[-1]
        edges.append(min(n + max(min(n * room // (4 * k), 3 * n), room // BLOCK_F), tiles))
    return list(itertools.pairwise(edges))


def spread(tiles: int) -> int:
    """A step that visits every tile once, and spreads the first few visits evenly over all tiles."""
    step = max(1, round(GOLDEN * tiles))
    while math.gcd(step, tiles) > 1:
        step += 1
    return step


def encode_topk(
    x: Tensor,  # [T, d], already normalised
    W_enc: Tensor,  # [d, F]
    b_enc: Tensor,  # [F]
    b_dec: Tensor | None,  # [d], None: not subtracted
    k: int,
) -> tuple[Tensor, Tensor]:
    """Values [T, K] >= 0 in descending order with ``x``'s dtype, and int64 indices [T, K]; sums are in float32."""
    (T, d), F = x.shape, W_enc.shape[1]
    values = torch.empty(T, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(T, k, dtype=torch.int64, device=x.device)
    if values.numel() == 0:
        return values, indices
    x = (x if b_dec is None else x - b_dec).to(W_enc.dtype)

    def run(config: tuning.Config) -> tuple[Tensor, Tensor]:
        return sort(largest(x, W_enc, b_enc, k, config), values, indices)

    if copyable(x) and (copyable(W_enc) or copyable(W_enc.T)):
        kind, candidates = "encode_topk, bulk copies", BULK + HALF
    else:
        kind, candidates = "encode_topk", SINGLE if x.dtype == torch.float32 else HALF
    return run(tuning.choose(kind, x, (T, d, F, k), candidates, run))


def copyable(x: Tensor) -> bool:
    """Whether the bulk copy engine can read tiles of ``x``: 16-bit numbers, and rows that start at 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0
    return x.element_size() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1] and aligned


def largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, config: tuning.Config) -> Tensor:
    """The list of keys per token [T, capacity]. The first k keys are the largest, in any order."""
    (T, d), F = x.shape, W_enc.shape[1]
    BLOCK_F = config["BLOCK_F"]
    capacity, tiles = list_length(d, F, k, BLOCK_F, x.element_size()), triton.cdiv(F, BLOCK_F)
    count = torch.full((T,), capacity, dtype=torch.int32, device=x.device)
    keys = torch.empty(T, capacity, dtype=torch.int64, device=x.device)
    shared = {
        "b_ptr": b_enc,
        "keys_ptr": keys,
        "count_ptr": count,
        "threshold_ptr": torch.empty(T, dtype=torch.int64, device=x.device),
        "D": d,
        "F": F,
        "CAPACITY": capacity,
        "stride": spread(tiles),
        "tiles": tiles,
        "b_s": b_enc.stride(),
    }
    pointers = {"x_ptr": x, "W_ptr": W_enc, "x_s": x.stride(), "W_s": W_enc.stride()}
    BLOCK = triton.next_power_of_2(capacity)
    num_warps = 1 if BLOCK <= 1024 else min(16, BLOCK // 512)  # one warp needs no barriers
    launch = bulk_filter(x, W_enc, config) if "programs" in config else plain_filter(pointers, config)
    for first, last in panels(F, k, capacity, BLOCK_F):
        launch(first, last, shared | {"T": T, "FILL": first == 0, "RAGGED": F % BLOCK_F != 0})
        select_kernel[(T,)](
            **shared,
            **pointers,
            K=k,
            first=first,
            last=last,
            BLOCK=BLOCK,
            WIDTH=64 * num_warps,
            BLOCK_F=BLOCK_F,
            BLOCK_D=16 // x.element_size(),
            num_warps=num_warps,
        )
    return keys


Launch = Callable[[int, int, dict[str, Any]], None]


def plain_filter(pointers: dict[str, Any], config: tuning.Config) -> Launch:
    """Launches one program per tile of a panel."""

    def launch(first: int, last: int, shared: dict[str, Any]) -> None:
        grid = (triton.cdiv(shared["T"], config["BLOCK_T"]), last - first)
        filter_kernel[grid](**pointers, **shared, first=first, **config)

    return launch


def bulk_filter(x: Tensor, W_enc: Tensor, config: tuning.Config) -> Launch:
    """Launches as many programs as run at once on the GPU."""
    tiles = {name: size for name, size in config.items() if name != "programs"}
    BLOCK_T, BLOCK_F, BLOCK_D = (tiles[f"BLOCK_{name}"] for name in "TFD")
    transposed = not copyable(W_enc)
    x_desc = TensorDescriptor.from_tensor(x, [BLOCK_T, BLOCK_D])
    if transposed:
        W_desc = TensorDescriptor.from_tensor(W_enc.T, [BLOCK_F, BLOCK_D])
    else:
        W_desc = TensorDescriptor.from_tensor(W_enc, [BLOCK_D, BLOCK_F])
    most = config["programs"] * tuning.multiprocessors(x.device)

    def launch(first: int, last: int, shared: dict[str, Any]) -> None:
        number = triton.cdiv(shared["T"], BLOCK_T) * (last - first)
        given = {"first": first, "last": last, "TRANSPOSED": transposed}
        bulk_filter_kernel[(min(number, most),)](x_desc=x_desc, W_desc=W_desc, **shared, **given, **tiles)

    return launch


def sort(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Write the codes of the keys into ``values`` and ``indices``."""
    (T, capacity), k = keys.shape, values.shape[1]
    BLOCK = triton.next_power_of_2(k)
    sort_kernel[(T,)](
        keys_ptr=keys,
        values_ptr=values,
        indices_ptr=indices,
        K=k,
        CAPACITY=capacity,
        BLOCK=BLOCK,
        num_warps=max(1, min(16, BLOCK // 256)),
    )
    return values, indices
