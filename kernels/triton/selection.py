"""Keys of pre-activations, and the lists of the largest keys that ``encode_topk`` keeps.

A value and its feature form one integer key. The high bits are the value's bits, mapped so that they sort as the values
do; the low bits are the complement of the index. All keys differ, and of equal values the lowest index wins.

``select_kernel`` cuts each token's list to its K largest keys. It searches the K-th largest value bit by bit, in 32-bit
arithmetic, from the highest bit in which the values differ, until K keys reach the bound. Only if equal values are left
does it search the low bits. ``sort_kernel`` puts the K keys in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))  # below every key
LAST = tl.constexpr(2**32 - 1)
HIGHEST = tl.constexpr(2**63 - 1)
LEAST, MOST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)  # LEAST is below every value
NAN = tl.constexpr(2**31 - 1)  # above every value, as bits and in order
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PIECE = tl.constexpr(64)  # features at a time of a panel that is computed again


@triton.jit
def ordered_bits(value):
    """int32 numbers in the order of the float32 values (none may be -0); NaN is above all, as in torch.topk.

    The values are sums. On a GPU, a sum that is NaN always has the bits NAN; in the interpreter, it may have others.
    """
    bits = value.to(tl.int32, bitcast=True)
    if INTERPRETED:
        bits = tl.where(value != value, NAN, bits)
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
def flipped(x):
    """uint32 numbers in the order of int32 numbers."""
    return x.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def bound_of(x, count, K):
    """The largest bound that K of the ``count`` int32 numbers above LEAST reach.

    It is found bit by bit, from the highest bit in which they differ. The search ends early at a lower bound if exactly
    K reach it. Also returns how many reach the bound.
    """
    top = flipped(tl.max(tl.max(x, 1), 0))
    below = top ^ flipped(tl.min(tl.min(tl.where(x == LEAST, MOST, x), 1), 0))
    for shift in tl.static_range(5):
        below |= below >> (1 << shift)  # the highest bit that differs, and all bits below it
    bound, reach, bit = (top | below) ^ below, count, below ^ (below >> 1)
    while (bit != 0) & (reach != K):
        trial = (bound | bit) ^ 0x80000000
        n = tl.sum(tl.sum((x >= trial.to(tl.int32, bitcast=True)).to(tl.int32), 1), 0)
        bound = tl.where(n >= K, bound | bit, bound)
        reach = tl.where(n >= K, n, reach)
        bit = bit >> 1
    return (bound ^ 0x80000000).to(tl.int32, bitcast=True), reach


@triton.jit
def cut(list_ptr, count, K, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Move a list's K largest keys to its head, in any order; returns the smallest of them.

    Each thread holds whole rows of keys, so that it counts, and stores, its own keys without the other threads.
    """
    ROWS: tl.constexpr = WIDTH if WIDTH < BLOCK else BLOCK
    slot = tl.arange(0, ROWS)[:, None] + ROWS * tl.arange(0, BLOCK // ROWS)[None, :]
    key = tl.load(list_ptr + slot, mask=slot < count, other=LOWEST)
    value = (key >> 32).to(tl.int32)
    bound, reach = bound_of(value, count, K)
    limit = tl.maximum(bound.to(tl.int64) << 32, LOWEST + 1)
    if reach > K:  # of equal values, the lowest features
        rest = tl.where(value == bound, key.to(tl.int32), LEAST)
        ties = tl.sum(tl.sum((value == bound).to(tl.int32), 1), 0)
        last, _ = bound_of(rest, ties, K - (reach - ties))
        limit |= last.to(tl.int64) & LAST
    keep = key >= limit
    number = keep.to(tl.int32)
    own = tl.sum(number, 1)
    place = (tl.cumsum(own, 0) - own)[:, None] + tl.cumsum(number, 1) - number
    tl.debug_barrier()  # every thread has read its keys before any is overwritten
    put(list_ptr + place, key, keep)
    tl.debug_barrier()
    return tl.min(tl.min(tl.where(keep, key, HIGHEST), 1), 0)


@triton.jit
def make_again(
    x_ptr, W_ptr, b_ptr, list_ptr, kth, t, K, D, F, CAPACITY, first, last, stride, tiles,
    x_s, W_s, b_s,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute a panel again for a token whose list was too short for it.

    The first K keys of the list are those from before the panel. Returns the new length.
    """
    count = K
    for turn in range(0, last - first):
        left = first_of(first + turn, stride, tiles, BLOCK_F)
        for f0 in range(0, BLOCK_F, PIECE):
            if count > CAPACITY - PIECE:
                kth = cut(list_ptr, count, K, BLOCK, WIDTH)
                count = K
            f = left + f0 + tl.arange(0, PIECE)
            pre = bias(b_ptr, f, F, b_s[0])
            for top in range(0, D, BLOCK_D):
                d = top + tl.arange(0, BLOCK_D)
                x = tl.load(x_ptr + t * x_s[0] + d * x_s[1], mask=d < D, other=0.0).to(tl.float32)
                at = W_ptr + d[:, None].to(tl.int64) * W_s[0] + f[None, :].to(tl.int64) * W_s[1]
                W = tl.load(at, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0).to(tl.float32)
                pre += tl.sum(x[:, None] * W, 0)
            key = key_of(ordered_bits(pre), f)
            keep = (key > kth) & (f < F)
            tl.store(list_ptr + count + tl.cumsum(keep.to(tl.int32), 0) - 1, key, mask=keep)
            tl.debug_barrier()
            count += tl.sum(keep.to(tl.int32))
    return count


@triton.jit(do_not_specialize=["first", "last"])
def select_kernel(
    x_ptr, W_ptr, b_ptr, keys_ptr, count_ptr, threshold_ptr, K, D, F, CAPACITY, first, last, stride, tiles,
    x_s, W_s, b_s,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cut a token's list to its K largest keys, and store the smallest of these. ``first:last`` is the latest panel."""
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + t)
    list_ptr = keys_ptr + t * CAPACITY
    if count > CAPACITY:
        kth = tl.load(threshold_ptr + t)
        count = make_again(
            x_ptr, W_ptr, b_ptr, list_ptr, kth, t, K, D, F, CAPACITY, first, last, stride, tiles,
            x_s, W_s, b_s, BLOCK, WIDTH, BLOCK_F, BLOCK_D,
        )  # fmt: skip
    if count <= BLOCK // 2:  # noqa: SIM108 (most lists, after the first panel)
        kth = cut(list_ptr, count, K, BLOCK // 2, WIDTH)
    else:
        kth = cut(list_ptr, count, K, BLOCK, WIDTH)
    tl.store(threshold_ptr + t, kth)
    tl.store(count_ptr + t, K)


@triton.jit
def sort_kernel(keys_ptr, values_ptr, indices_ptr, K, CAPACITY, BLOCK: tl.constexpr):
    """Write values after ReLU and features in descending order."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    key = tl.sort(tl.load(keys_ptr + t * CAPACITY + i, mask=i < K, other=LOWEST), descending=True)
    value = tl.maximum(value_of(key), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values_ptr + t * K + i, value, mask=i < K)
    tl.store(indices_ptr + t * K + i, LAST - (key & LAST), mask=i < K)
