"""The K largest of ``(x - b_dec) @ W_enc + b_enc`` for each token, then ReLU; [T, F] is never held whole.

A value and its feature are one integer key: the value's bits, in their order, above the complement of the index.
Keys differ from each other, and the lower index wins among equal values. Features come in panels. The first one
fills a token's short list; ``select`` cuts a list that the next panel might overflow to its K largest, which sets
the token's threshold; every later panel appends only what beats that. So the list is exact at any time, and after
the first panels few pre-activations leave the registers.

Operations: ``2 T d F`` (one matrix product). Bytes: ``T d + d F`` elements read for each pass of a tile, and about
``T K log(F / list)`` keys of 8 bytes written and read; the list takes at most 5% of ``4 T F`` bytes, or K and a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

LOWEST = tl.constexpr(-(2**63))  # below every key
LAST = tl.constexpr(2**32 - 1)
SHARE = 0.05  # of the 4 T F bytes that dense pre-activations would take

# Of the filter, BLOCK_F of 64, 128 or 256; all that spill no register where they are offered. float32 takes twice the
# room and three products for one.
SINGLE = [
    {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
]
HALF = [
    {"BLOCK_T": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_T": 128, "BLOCK_F": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "cards": (9,)},
    {"BLOCK_T": 64, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
]


@triton.jit
def ordered_bits(value):
    """int32 numbers in the order of the float32 ones; NaN above all, as torch.topk has it."""
    value = tl.where(value == 0, 0.0, value)  # -0 equals 0
    bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def append(
    pre, t, f, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, last, CAPACITY, b_f, FILL: tl.constexpr
):  # fmt: skip
    """The keys of a tile that beat their token's threshold, or (FILL) all of them, go to the ends of the lists."""
    pre += tl.load(b_ptr + f * b_f, mask=f < last, other=0.0).to(tl.float32)[None, :]
    ordered = ordered_bits(pre)
    keep = (t < T)[:, None] & (f < last)[None, :]
    if FILL:
        slot = tl.broadcast_to(f[None, :], pre.shape)
    else:
        # an equal one comes later than all in the list, and loses
        keep &= ordered > tl.load(threshold_ptr + t, mask=t < T, other=0)[:, None]
        counts = tl.broadcast_to(count_ptr + t[:, None], pre.shape)
        slot = tl.atomic_add(counts, 1, mask=keep, sem="relaxed")  # any order: keys are told apart by selection alone
    key = (ordered.to(tl.int64) << 32) | (LAST - f[None, :].to(tl.int64))
    tl.store(keys_ptr + t[:, None].to(tl.int64) * CAPACITY + slot, key, mask=keep)


@triton.jit
def halves(x):
    """The left and the right half of the columns; both stay in their registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def filter_kernel(
    x_ptr, W_ptr, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, D, first, last, CAPACITY,
    x_t, x_d, W_d, W_f, b_f,
    FILL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Makes the pre-activations of features ``first:last``, and keeps those that may be among the K largest."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    left = first + tl.program_id(1) * BLOCK_F
    f = left + tl.arange(0, BLOCK_F)
    x_at = x_ptr + t[:, None].to(tl.int64) * x_t
    W_at = W_ptr + f[None, :].to(tl.int64) * W_f
    pre = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for top in range(0, D, BLOCK_D):
        d = top + tl.arange(0, BLOCK_D)
        x = tl.load(x_at + d[None, :] * x_d, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        W = tl.load(W_at + d[:, None].to(tl.int64) * W_d, mask=(d < D)[:, None] & (f < last)[None, :], other=0.0)
        pre = tl.dot(x, W, pre, input_precision="tf32x3")
    if BLOCK_F == 64:
        append(pre, t, f, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, last, CAPACITY, b_f, FILL)
    else:  # 64 columns at a time, for keys take twice the registers
        f = left + tl.arange(0, 64)
        one, two = halves(pre)
        if BLOCK_F == 256:
            one, three = halves(one)
            two, four = halves(two)
            append(three, t, f + 64, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, last, CAPACITY, b_f, FILL)
            append(four, t, f + 192, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, last, CAPACITY, b_f, FILL)
        append(one, t, f, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, last, CAPACITY, b_f, FILL)
        append(two, t, f + BLOCK_F // 2, b_ptr, keys_ptr, count_ptr, threshold_ptr, T, last, CAPACITY, b_f, FILL)


@triton.jit
def select_kernel(keys_ptr, count_ptr, threshold_ptr, K, CAPACITY, room, BLOCK: tl.constexpr):
    """Cuts a token's list to its K largest keys where it holds more than ``room``."""
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + t)
    if count > room:
        slot = tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + t * CAPACITY + slot, mask=slot < count, other=LOWEST)
        kth = tl.full([], LOWEST, tl.int64)
        for step in range(64):  # the largest number that K keys reach, from its highest bit down
            trial = kth ^ (tl.full([], 1, tl.int64) << (63 - step))
            kth = tl.where(tl.sum((key >= trial).to(tl.int32)) >= K, trial, kth)
        keep = key >= kth
        to = tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(keys_ptr + t * CAPACITY + to, key, mask=keep)
        tl.store(threshold_ptr + t, (kth >> 32).to(tl.int32))
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


def panel_sizes(d: int, F: int, k: int, BLOCK_F: int, itemsize: int) -> tuple[int, int]:
    """Keys in a token's list, within SHARE or at least K and a tile; and features in a panel after the first."""
    spare = int(SHARE * 4 * F) - d * itemsize - 16  # bytes a token, less its x - b_dec, count and threshold
    capacity = min(max(spare // 8, k + BLOCK_F), F)
    # two thirds of the room: a list is cut only after it has grown for some panels
    return capacity, max(1, (capacity - k) * 2 // 3 // BLOCK_F) * BLOCK_F


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
    capacity, panel = panel_sizes(d, F, k, config["BLOCK_F"], x.element_size())
    keys = torch.empty(T, capacity, dtype=torch.int64, device=x.device)
    count = torch.full((T,), capacity, dtype=torch.int32, device=x.device)
    threshold = torch.empty_like(count)
    strides = (*x.stride(), *W_enc.stride(), *b_enc.stride())
    BLOCK = triton.next_power_of_2(capacity)
    num_warps = max(1, min(8, BLOCK // 512))

    def add(first: int, last: int) -> None:
        grid = (triton.cdiv(T, config["BLOCK_T"]), triton.cdiv(last - first, config["BLOCK_F"]))
        sizes = (T, d, first, last, capacity)
        filter_kernel[grid](x, W_enc, b_enc, keys, count, threshold, *sizes, *strides, FILL=first == 0, **config)

    def select(room: int) -> None:
        select_kernel[(T,)](keys, count, threshold, k, capacity, room, BLOCK=BLOCK, num_warps=num_warps)

    add(0, capacity)
    for first in range(capacity, F, panel):
        select(capacity - panel)
        add(first, min(first + panel, F))
    select(k)
    return keys


def sort(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the codes of the keys into ``values`` and ``indices``."""
    (T, capacity), k = keys.shape, values.shape[1]
    BLOCK = min(256, triton.next_power_of_2(k))
    grid = (T, triton.cdiv(k, BLOCK))
    sort_kernel[grid](keys, values, indices, k, capacity, BLOCK=BLOCK, BLOCK_OTHER=16, num_warps=4)
    return values, indices
