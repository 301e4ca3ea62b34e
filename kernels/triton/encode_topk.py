"""The K largest of ``(x - b_dec) @ W_enc + b_enc`` for each token, then ReLU; [T, F] is never held whole.

A value and its feature are one integer key: the value's bits, in their order, above the complement of the index.
Keys differ from each other, and the lower index wins among equal values. The first panel of features fills a token's
short list. ``select`` cuts a list to its K largest, whose least is the token's threshold; the next panel appends what
beats that, about K for every feature in it over those before. So panels grow with what came before them, and a few of
them are all. Tiles are visited spread over F, so that every panel is a fair sample in whatever order an SAE has its
features; where a list was still too short, ``select`` makes that token's panel again, piece by piece, exactly.

Operations: ``2 T d F`` (one matrix product). Bytes: ``T d + d F`` elements read for each pass of a tile, and about
``T K log(F / list)`` keys of 8 bytes written and read; the list takes at most 5% of ``4 T F`` bytes, or K and a tile.
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
NEVER, ALWAYS = tl.constexpr(2**31 - 1), tl.constexpr(-(2**31))  # floors that no number and every number beats
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PIECE = tl.constexpr(64)  # features at a time of a panel that is made again

# Of the filter; 16 rows a warp, so that each row lies within one. All that spill no register where they are offered.
# float32 takes twice the room and three products for one.
SINGLE = [
    {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
]
HALF = [  # the first for two programs a multiprocessor, one of which multiplies while the other one chooses
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_T": 128, "BLOCK_F": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4, "cards": (9,)},
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_T": 64, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
]


@triton.jit
def ordered_bits(value, nan):
    """int32 numbers in the order of the float32 ones, of which none is -0; NaN above all, as torch.topk has it."""
    bits = tl.where(value != value, nan, value.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def bias(b_ptr, f, F, b_f):
    """Never -0, so that no sum with it is; -infinity past the end."""
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
    """The first feature of the tile that is visited at this turn."""
    return ((turn.to(tl.int64) * stride) % tiles).to(tl.int32) * BLOCK_F


@triton.jit
def halves(x):
    """The left and the right half of the columns; both stay in their registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def put(at, key, keep):
    """A masked store by the threads that have the keys; tl.store's would first move them to others, for no gain."""
    if INTERPRETED:
        tl.store(at, key, mask=keep)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.b64 [$1], $2; mov.u32 $0, 0; }", "=r,l,l,r",
            [at.to(tl.int64), key, keep.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def append(ordered, floor, row, at, f):
    """Puts the keys that beat their row's floor at ``at`` and on, 8 columns at a time, two for each of 4 threads."""
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
    x_t, x_d, W_d, W_f, b_f,
    FILL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Makes the pre-activations of a panel's tile, and keeps those that may be among the K largest."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    left = first_of(first + tl.program_id(1), stride, tiles, BLOCK_F)
    f = left + tl.arange(0, BLOCK_F)
    x_at = x_ptr + t[:, None].to(tl.int64) * x_t
    W_at = W_ptr + f[None, :].to(tl.int64) * W_f
    pre = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for top in range(0, D, BLOCK_D):
        d = top + tl.arange(0, BLOCK_D)
        x = tl.load(x_at + d[None, :] * x_d, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        W = tl.load(W_at + d[:, None].to(tl.int64) * W_d, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0)
        pre = tl.dot(x, W, pre, input_precision="tf32x3")
    nan = tl.where(f < F, NAN, MINUS_INFINITY)[None, :]  # nothing past the end beats anything
    ordered = ordered_bits(pre + bias(b_ptr, f, F, b_f)[None, :], nan)
    quarter = tl.arange(0, 4)  # of the threads that share a row: each one's keys come together
    if FILL:
        floor = tl.where(t < T, ALWAYS, NEVER)
        at = tl.program_id(1) * BLOCK_F + (quarter * (BLOCK_F // 4))[None, :] + tl.zeros_like(t)[:, None]
    else:
        threshold = tl.load(threshold_ptr + t, mask=t < T, other=HIGHEST)
        # its own feature is in an earlier tile, so all of this one wins or loses where they are equal
        floor = (threshold >> 32).to(tl.int32) - (left < LAST - (threshold & LAST)).to(tl.int32)
        keep = (ordered > floor[:, None]).to(tl.int32)
        number = tl.sum(tl.sum(tl.reshape(keep, [BLOCK_T, BLOCK_F // 8, 4, 2]), 3), 1)
        before = tl.sum(tl.where(quarter[None, :, None] < quarter[None, None, :], number[:, :, None], 0), 1)
        total = tl.sum(number, 1)
        # in any order: keys are told apart by selection alone
        start = tl.atomic_add(count_ptr + t, total, mask=total > 0, sem="relaxed")
        floor = tl.where(start + total > CAPACITY, NEVER, floor)  # the count will say that this was lost
        at = start[:, None] + before
    append(ordered, floor[:, None], keys_ptr + t[:, None].to(tl.int64) * CAPACITY, at, left)


@triton.jit
def cut(list_ptr, count, K, BLOCK: tl.constexpr):
    """Leaves a list's K largest keys at its head; the least of them."""
    slot = tl.arange(0, BLOCK)
    key = tl.load(list_ptr + slot, mask=slot < count, other=LOWEST)
    bound = tl.full([], LOWEST, tl.int64)
    reach, step = count, 0
    while (step < 64) & (reach != K):  # the largest number that K keys reach, from its highest bit down
        trial = bound ^ (tl.full([], 1, tl.int64) << (63 - step))
        n = tl.sum((key >= trial).to(tl.int32))
        reach = tl.where(n >= K, n, reach)
        bound = tl.where(n >= K, trial, bound)
        step += 1
    keep = (key >= bound) & (slot < count)
    tl.debug_barrier()  # all was read before any of it is written over
    tl.store(list_ptr + tl.cumsum(keep.to(tl.int32), 0) - 1, key, mask=keep)
    tl.debug_barrier()
    return tl.min(tl.where(keep, key, HIGHEST))


@triton.jit
def make_again(
    x_ptr, W_ptr, b_ptr, list_ptr, kth, t, K, D, F, CAPACITY, first, last, stride, tiles,
    x_t, x_d, W_d, W_f, b_f,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A token's list after a panel that it had no room for: K keys stand at its head from before. The new length."""
    count = K
    for turn in range(0, last - first):
        left = first_of(first + turn, stride, tiles, BLOCK_F)
        for f0 in range(0, BLOCK_F, PIECE):
            if count > CAPACITY - PIECE:
                kth = cut(list_ptr, count, K, BLOCK)
                count = K
            f = left + f0 + tl.arange(0, PIECE)
            pre = bias(b_ptr, f, F, b_f)
            for top in range(0, D, BLOCK_D):
                d = top + tl.arange(0, BLOCK_D)
                x = tl.load(x_ptr + t * x_t + d * x_d, mask=d < D, other=0.0).to(tl.float32)
                at = W_ptr + d[:, None].to(tl.int64) * W_d + f[None, :].to(tl.int64) * W_f
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
    x_t, x_d, W_d, W_f, b_f,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cuts a token's list to its K largest keys, and notes the least of them; ``first:last`` is the latest panel."""
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + t)
    list_ptr = keys_ptr + t * CAPACITY
    if count > CAPACITY:
        kth = tl.load(threshold_ptr + t)
        count = make_again(
            x_ptr, W_ptr, b_ptr, list_ptr, kth, t, K, D, F, CAPACITY, first, last, stride, tiles,
            x_t, x_d, W_d, W_f, b_f, BLOCK, BLOCK_F, BLOCK_D,
        )  # fmt: skip
    kth = cut(list_ptr, count, K, BLOCK)
    tl.store(threshold_ptr + t, kth)
    tl.store(count_ptr + t, K)


@triton.jit
def sort_kernel(
    keys_ptr, values_ptr, indices_ptr, K, CAPACITY, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr
):  # fmt: skip
    """A key's place is the number of keys above it: values after ReLU, and features, in descending order."""
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
    """Keys that a token's list holds, in whole tiles: within SHARE, at least K and a tile, and no more than serve."""
    spare = int(SHARE * 4 * F) - d * itemsize - 12  # bytes a token, less its x - b_dec, count and threshold
    tiles = max(min(spare // 8, 8 * k) // BLOCK_F, triton.cdiv(k, BLOCK_F) + 1)
    return min(tiles, triton.cdiv(F, BLOCK_F)) * BLOCK_F


def panels(F: int, k: int, capacity: int, BLOCK_F: int) -> list[tuple[int, int]]:
    """The first and the last turn of each panel's tiles; the first panel fills the lists.

    Of a panel of m features after n others, about k m / n are among the k largest so far. That may fill a quarter of
    a list's room; and no panel has more than three times what came before it, for a few k vary more.
    """
    tiles, room = triton.cdiv(F, BLOCK_F), capacity - k
    edges = [0, capacity // BLOCK_F]
    while edges[-1] < tiles:
        n = edges[-1]
        edges.append(min(n + max(min(n * room // (4 * k), 3 * n), room // BLOCK_F), tiles))
    return list(itertools.pairwise(edges))


def spread(tiles: int) -> int:
    """A step that visits all tiles once, and of any stretch of them its share among the first few."""
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
    """Values [T, K] >= 0, of ``x``'s dtype, in descending order and int64 indices [T, K]; sums are in float32."""
    (T, d), F = x.shape, W_enc.shape[1]
    values = torch.empty(T, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(T, k, dtype=torch.int64, device=x.device)
    if values.numel() == 0:
        return values, indices
    x = x if b_dec is None else x - b_dec

    def run(config: tuning.Config) -> tuple[Tensor, Tensor]:
        return sort(largest(x, W_enc, b_enc, k, config), values, indices)

    return run(tuning.choose("encode_topk", x, (T, d, F, k), SINGLE if x.dtype == torch.float32 else HALF, run))


def largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, config: tuning.Config) -> Tensor:
    """Each token's list of keys [T, capacity], whose first k are the largest, in any order."""
    (T, d), F = x.shape, W_enc.shape[1]
    BLOCK_F = config["BLOCK_F"]
    capacity, tiles = list_length(d, F, k, BLOCK_F, x.element_size()), triton.cdiv(F, BLOCK_F)
    keys = torch.empty(T, capacity, dtype=torch.int64, device=x.device)
    count = torch.full((T,), capacity, dtype=torch.int32, device=x.device)
    threshold = torch.empty(T, dtype=torch.int64, device=x.device)
    tensors, strides = (x, W_enc, b_enc, keys, count, threshold), (*x.stride(), *W_enc.stride(), *b_enc.stride())
    BLOCK = triton.next_power_of_2(capacity)
    num_warps = 1 if BLOCK <= 1024 else min(16, BLOCK // 512)  # one warp needs no barriers
    order = (spread(tiles), tiles)
    for first, last in panels(F, k, capacity, BLOCK_F):
        grid = (triton.cdiv(T, config["BLOCK_T"]), last - first)
        filter_kernel[grid](*tensors, T, d, F, capacity, first, *order, *strides, FILL=first == 0, **config)
        select_kernel[(T,)](
            *tensors, k, d, F, capacity, first, last, *order, *strides,
            BLOCK=BLOCK, BLOCK_F=BLOCK_F, BLOCK_D=32, num_warps=num_warps,
        )  # fmt: skip
    return keys


def sort(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the codes of the keys into ``values`` and ``indices``."""
    (T, capacity), k = keys.shape, values.shape[1]
    BLOCK = min(256, triton.next_power_of_2(k))
    grid = (T, triton.cdiv(k, BLOCK))
    sort_kernel[grid](keys, values, indices, k, capacity, BLOCK=BLOCK, BLOCK_OTHER=16, num_warps=4)
    return values, indices
