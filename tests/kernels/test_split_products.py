"""The error of float32 products that are computed as three products of narrower numbers.

Triton's interpreter always multiplies in float32, so these tests do by hand what a GPU does. Each number is a narrow
number plus a narrow rest, and the product is high * high + high * low + low * high. Sums are exact here (float32 on a
GPU), so the error is only that of the split. It is relative to the product of absolute values.
"""

from __future__ import annotations

import pytest
import torch


def bfloat16(x):
    """8 bits, rounded to nearest: the relative error is 2^-8. The rest is rounded too, so both together have 2^-16."""
    return x.to(torch.bfloat16).float()


def tfloat32(x):
    """11 bits, rounded to nearest, ties away from zero: cvt.rna.tf32.f32."""
    return ((x.view(torch.int32) + (1 << 12)) & ~0x1FFF).view(torch.float32)


def cut_tfloat32(x):
    """The bits of a float32 number that the matrix unit reads."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


# The bounds: the rounding of both numbers, and the product of the two rests, which is not computed.
SPLITS = {"bf16x3": (bfloat16, bfloat16, 3.01 * 2**-16), "tf32x3": (tfloat32, cut_tfloat32, 5 * 2**-22)}


def three_products(a, b, first, rest):
    parts = [(first(x), rest(x - first(x))) for x in (a, b)]
    (a_high, a_low), (b_high, b_low) = ((high.double(), low.double()) for high, low in parts)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


def numbers(*shape, seed):
    """Random numbers with magnitudes from 2^-8 to 2^8 and both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(16 * torch.rand(shape, generator=generator) - 8)


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize(("M", "K", "N"), [(128, 32, 16), (64, 768, 64), (1, 1, 1)])
def test_a_split_product_is_as_good_as_its_bits(kind, M, K, N):
    first, rest, bound = SPLITS[kind]
    a, b = numbers(M, K, seed=1), numbers(K, N, seed=2)
    error = (three_products(a, b, first, rest) - a.double() @ b.double()).abs()
    scale = a.double().abs() @ b.double().abs()
    assert bool((error <= bound * scale).all())


@pytest.mark.parametrize(("kind", "usual"), [("bf16x3", 2**-17), ("tf32x3", 2**-23)])
def test_the_usual_error_is_far_below_the_bound(kind, usual):
    """The root mean square error of single products; sums of many products are even better."""
    first, rest, _ = SPLITS[kind]
    a, b = numbers(500, 1, seed=1), numbers(1, 500, seed=2)
    error = three_products(a, b, first, rest) / (a.double() @ b.double()) - 1
    assert float(error.square().mean().sqrt()) < usual


@pytest.mark.parametrize("kind", SPLITS)
def test_one_narrow_product_is_not_enough(kind):
    first, _, bound = SPLITS[kind]
    a, b = numbers(64, 64, seed=1), numbers(64, 64, seed=2)
    error = (first(a).double() @ first(b).double() - a.double() @ b.double()).abs()
    assert float((error / (a.double().abs() @ b.double().abs())).max()) > 16 * bound


def test_relevancy_keeps_its_precision_through_twelve_blocks():
    """``r <- r + r @ E`` as three bfloat16 products. E is like relevancy's: not negative, row sums about 1/2."""
    E = torch.rand(12, 197, 197, generator=torch.Generator().manual_seed(3)) ** 8
    E /= 2 * E.sum(-1, keepdim=True)
    row = torch.zeros(1, 197)
    row[0, 0] = 1
    exact = row.double()
    for block in E:
        exact = exact + exact @ block.double()
        row = row + three_products(row, block, bfloat16, bfloat16).float()
    assert float(((row - exact).abs() / exact).max()) < 2**-14
