"""The K largest of ``(x - b_dec) @ W_enc + b_enc`` per token, then ReLU. The array [T, F] is never stored.

A value and its feature form one integer key. The high bits are the value's bits, mapped so that they sort as the values
do; the low bits are the complement of the index. All keys differ, and of equal values the lowest index wins.

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

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

LOWEST = tl.constexpr(-(2**63))  # below every key
LAST = tl.constexpr(2**32 - 1)
HIGHEST = tl.constexpr(2**63 - 1)
SHARE = 0.05  # of the 4 T F bytes that dense pre-activations would take
GOLDEN = (5**0.5 - 1) / 2
NAN, MINUS_INFINITY = tl.constexpr(0x7FC00000), tl.constexpr(-0x00800000)  # as bits
NEVER, ALWAYS = tl.constexpr(2**31 - 1), tl.constexpr(-(2**31))  # floors that no number, and every number, exceeds
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PIECE = tl.constexpr(64)  # features at a time of a panel that is computed again

# For the filter: 16 rows per warp, so that each row lies within one warp. No configuration spills registers on its
# GPUs. float32 takes twice the memory and three products.
SINGLE = [
    {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
]
HALF = [  # the first runs two programs per multiprocessor: one multiplies while the other chooses
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_T": 128, "BLOCK_F": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_T": 64, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
]


@triton.jit
def ordered_bits(value, nan):
    """int32 numbers in the order of the float32 values (none may be -0); NaN is above all, as in torch.topk."""
    bits = tl.where(value != value, nan, value.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def bias(b_ptr, f, F, b_f):
    """The bias of features ``f``, never -0, so that no sum with it is -0; -infinity past the end."""
    b = tl.load(b_ptr + f * b_f, mask=f < F, other=-float("inf")).to(tl.float32)
    return tl.where(b == 0, 0.0, b)


@triton.jit
def value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_of(ordered, f):
    return (ordered.to(tl.int64) << 32) | (LAST - f.to(tl.int64))


@triton.jit
def first_of(turn, stride, tiles, BLOCK_F: tl.constexpr):
    """The first feature of the tile that is visited in this turn."""
    return ((turn.to(tl.int64) * stride) % tiles).to(tl.int32) * BLOCK_F


@triton.jit
def halves(x):
    """The left and the right half of the columns, without moving them between registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def put(at, key, keep):
    """A masked store by the threads that hold the keys. tl.store would first move them to other threads."""
    if INTERPRETED:
        tl.store(at, key, mask=keep)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.b64 [$1], $2; mov.u32 $0, 0; }", "=r,l,l,r",
            [at.to(tl.int64), key, keep.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def append(ordered, floor, row, at, f):
    """Store the keys above their row's floor from ``at`` on, 8 columns at a time, two for each of 4 threads."""
    if ordered.shape[1] > 8:
        half: tl.constexpr = ordered.shape[1] // 2
        left, right = halves(ordered)
        at = append(left, floor, row, at, f)
        at = append(right, floor, row, at, f + half)
    else:
        even, odd = tl.split(tl.reshape(ordered, [ordered.shape[0], 4, 2]))
        f += 2 * tl.arange(0, 4)[None, :]
        keep = even > floor
        put(row + at, key_of(even, f), keep)
        at += keep.to(tl.int32)
        keep = odd > floor
        put(row + at, key_of(odd, f + 1), keep)
        at += keep.to(tl.int32)
    return at


@triton.jit(do_not_specialize=["first"])
def filter_kernel(
    x_ptr, W_ptr, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, D, F, CAPACITY, first, stride, tiles,
    x_s, W_s, b_s,
    FILL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the pre-activations of one tile, and append those that may be among the K largest to the lists."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
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
    nan = tl.where(f < F, NAN, MINUS_INFINITY)[None, :]  # past the end: below every floor
    ordered = ordered_bits(pre + bias(b_ptr, f, F, b_s[0])[None, :], nan)
    quarter = tl.arange(0, 4)  # the threads that share a row; each stores its keys next to each other
    if FILL:
        floor = tl.where(t < T, ALWAYS, NEVER)
        at = tl.program_id(1) * BLOCK_F + (quarter * (BLOCK_F // 4))[None, :] + tl.zeros_like(t)[:, None]
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
    append(ordered, floor[:, None], keys_ptr + t[:, None].to(tl.int64) * CAPACITY, at, left)


@triton.jit
def cut(list_ptr, count, K, BLOCK: tl.constexpr):
    """Move a list's K largest keys to its head; returns the smallest of them."""
    slot = tl.arange(0, BLOCK)
    key = tl.load(list_ptr + slot, mask=slot < count, other=LOWEST)
    bound = tl.full([], LOWEST, tl.int64)
    reach, step = count, 0
    while (step < 64) & (reach != K):  # the largest bound that K keys reach, bit by bit from the highest
        trial = bound ^ (tl.full([], 1, tl.int64) << (63 - step))
        n = tl.sum((key >= trial).to(tl.int32))
        reach = tl.where(n >= K, n, reach)
        bound = tl.where(n >= K, trial, bound)
        step += 1
    keep = (key >= bound) & (slot < count)
    tl.debug_barrier()  # every thread has read its keys before any is overwritten
    tl.store(list_ptr + tl.cumsum(keep.to(tl.int32), 0) - 1, key, mask=keep)
    tl.debug_barrier()
    return tl.min(tl.where(keep, key, HIGHEST))


@triton.jit
def make_again(
    x_ptr, W_ptr, b_ptr, list_ptr, kth, t, K, D, F, CAPACITY, first, last, stride, tiles,
    x_s, W_s, b_s,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute a panel again for a token whose list was too short for it.

    The first K keys of the list are those from before the panel. Returns the new length.
    """
    count = K
    for turn in range(0, last - first):
        left = first_of(first + turn, stride, tiles, BLOCK_F)
        for f0 in range(0, BLOCK_F, PIECE):
            if count > CAPACITY - PIECE:
                kth = cut(list_ptr, count, K, BLOCK)
                count = K
            f = left + f0 + tl.arange(0, PIECE)
            pre = bias(b_ptr, f, F, b_s[0])
            for top in range(0, D, BLOCK_D):
                d = top + tl.arange(0, BLOCK_D)
                x = tl.load(x_ptr + t * x_s[0] + d * x_s[1], mask=d < D, other=0.0).to(tl.float32)
                at = W_ptr + d[:, None].to(tl.int64) * W_s[0] + f[None, :].to(tl.int64) * W_s[1]
                W = tl.load(at, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0).to(tl.float32)
                pre += tl.sum(x[:, None] * W, 0)
            key = key_of(ordered_bits(pre, NAN), f)
            keep = (key > kth) & (f < F)
            tl.store(list_ptr + count + tl.cumsum(keep.to(tl.int32), 0) - 1, key, mask=keep)
            tl.debug_barrier()
            count += tl.sum(keep.to(tl.int32))
    return count


@triton.jit(do_not_specialize=["first", "last"])
def select_kernel(
    x_ptr, W_ptr, b_ptr, keys_ptr, count_ptr, threshold_ptr, K, D, F, CAPACITY, first, last, stride, tiles,
    x_s, W_s, b_s,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cut a token's list to its K largest keys, and store the smallest of these. ``first:last`` is the latest panel."""
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + t)
    list_ptr = keys_ptr + t * CAPACITY
    if count > CAPACITY:
        kth = tl.load(threshold_ptr + t)
        count = make_again(
            x_ptr, W_ptr, b_ptr, list_ptr, kth, t, K, D, F, CAPACITY, first, last, stride, tiles,
            x_s, W_s, b_s, BLOCK, BLOCK_F, BLOCK_D,
        )  # fmt: skip
    kth = cut(list_ptr, count, K, BLOCK)
    tl.store(threshold_ptr + t, kth)
    tl.store(count_ptr + t, K)


@triton.jit
def sort_kernel(
    keys_ptr, values_ptr, indices_ptr, K, CAPACITY, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr
):  # fmt: skip
    """Write values after ReLU and features in descending order; a key's place is the number of keys above it."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + t * CAPACITY + i, mask=i < K, other=LOWEST)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, K, BLOCK_OTHER):
        j = first + tl.arange(0, BLOCK_OTHER)
        other = tl.load(keys_ptr + t * CAPACITY + j, mask=j < K, other=LOWEST)
        place += tl.sum((other[None, :] > key[:, None]).to(tl.int32), 1)
    value = tl.maximum(value_of(key), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values_ptr + t * K + place, value, mask=i < K)
    tl.store(indices_ptr + t * K + place, LAST - (key & LAST), mask=i < K)


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

    return run(tuning.choose("encode_topk", x, (T, d, F, k), SINGLE if x.dtype == torch.float32 else HALF, run))


def largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, config: tuning.Config) -> Tensor:
    """The list of keys per token [T, capacity]. The first k keys are the largest, in any order."""
    (T, d), F = x.shape, W_enc.shape[1]
    BLOCK_F = config["BLOCK_F"]
    capacity, tiles = list_length(d, F, k, BLOCK_F, x.element_size()), triton.cdiv(F, BLOCK_F)
    keys = torch.empty(T, capacity, dtype=torch.int64, device=x.device)
    count = torch.full((T,), capacity, dtype=torch.int32, device=x.device)
    threshold = torch.empty(T, dtype=torch.int64, device=x.device)
    shared = {
        "x_ptr": x,
        "W_ptr": W_enc,
        "b_ptr": b_enc,
        "keys_ptr": keys,
        "count_ptr": count,
        "threshold_ptr": threshold,
        "D": d,
        "F": F,
        "CAPACITY": capacity,
        "stride": spread(tiles),
        "tiles": tiles,
        "x_s": x.stride(),
        "W_s": W_enc.stride(),
        "b_s": b_enc.stride(),
    }
    BLOCK = triton.next_power_of_2(capacity)
    num_warps = 1 if BLOCK <= 1024 else min(16, BLOCK // 512)  # one warp needs no barriers
    for first, last in panels(F, k, capacity, BLOCK_F):
        grid = (triton.cdiv(T, config["BLOCK_T"]), last - first)
        filter_kernel[grid](**shared, T=T, first=first, FILL=first == 0, **config)
        select_kernel[(T,)](
            **shared,
            K=k,
            first=first,
            last=last,
            BLOCK=BLOCK,
            BLOCK_F=BLOCK_F,
            BLOCK_D=32,
            num_warps=num_warps,
        )
    return keys


def sort(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Write the codes of the keys into ``values`` and ``indices``."""
    (T, capacity), k = keys.shape, values.shape[1]
    BLOCK = min(256, triton.next_power_of_2(k))
    grid = (T, triton.cdiv(k, BLOCK))
    sort_kernel[grid](
        keys_ptr=keys,
        values_ptr=values,
        indices_ptr=indices,
        K=k,
        CAPACITY=capacity,
        BLOCK=BLOCK,
        BLOCK_OTHER=16,
        num_warps=4,
    )
    return values, indices
