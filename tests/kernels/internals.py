"""Parts that only the Triton kernels have: the splits of their work, their lists, and every choice of tuning.

``test_triton.py`` runs this file with ``tests/ops/test_parity.py``, which compares the results with the reference.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastfg import reference
from tests.ops import cases
from tests.ops.cases import DEVICE, TYPICAL, cast, randn
from tests.ops.compare import check, run
from tests.ops.test_parity import _poison  # noqa: F401

# isort: split
from fastfg.kernels import encode_topk, gated_relevancy, relevancy, tuning


def typical(op, dtype=torch.float32):
    return list(cast(op, TYPICAL[op](), dtype))


# Heads in one program, or split among several ------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1, 3])
def test_relevancy_of_heads_that_are_not_split(C, monkeypatch):
    monkeypatch.setattr(relevancy, "PROGRAMS", 1)
    check("relevancy", cast("relevancy", cases.relevancy(C, 2, 2, 50, 32, True, "paper"), torch.float32), "triton")


@pytest.mark.parametrize("programs", [1, 264])
def test_gated_relevancy_of_few_and_many_programs(programs, monkeypatch):
    monkeypatch.setattr(relevancy, "PROGRAMS", programs)
    check("gated_relevancy", typical("gated_relevancy"), "triton")


# Rows in float64 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("C", "programs"), [(1, 1), (1, 264), (3, 264)])
def test_relevancy_keeps_what_is_far_smaller_than_float64_rows(C, programs, gated, paper, monkeypatch):
    monkeypatch.setattr(relevancy, "PROGRAMS", programs)
    rows, q, k, v, dO, scale, gates, _ = cases.relevancy(C, 2, 2, 50, 32, gated, "paper")
    rows = torch.full_like(rows, 1 / 50)
    q, k, v, dO = (t.float() for t in (q, k, v, 1e-10 * dO))
    found = relevancy.relevancy(rows, q, k, v, dO, scale, gates, paper)
    exact = reference.relevancy(rows, q, k, v, dO, scale, gates, "paper" if paper else "transmm")
    base = rows + rows * (1 if gates is None else gates) if paper else rows
    assert found.dtype == torch.float64
    assert float((found - exact).abs().max() / (exact - base).abs().max()) < 1e-5


# The log-sum-exp that a model's own attention kept --------------------------------------------------------------------


def test_relevancy_takes_a_log_sum_exp():
    *tensors, _ = typical("relevancy")
    _, q, k, _, _, scale, _ = tensors
    lse = torch.logsumexp(q @ k.mT * scale, -1)
    found = relevancy.relevancy(*tensors, False, lse=lse)
    torch.testing.assert_close(found, relevancy.relevancy(*tensors, False), rtol=1e-5, atol=1e-5)


def test_gated_relevancy_takes_a_log_sum_exp():
    *tensors, _ = typical("gated_relevancy")
    _, q, k, _, _, scale = tensors[:6]
    found = gated_relevancy.gated_relevancy(*tensors, False, lse=torch.logsumexp(q @ k.mT * scale, -1))
    for ours, expected in zip(found, gated_relevancy.gated_relevancy(*tensors, False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# encode_topk's tiles and lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 20, 200])
@pytest.mark.parametrize("order", ["none", "by index", "as visited"])
def test_ties_go_to_the_lowest_index_however_lists_fill(order, k):
    """Whole numbers, so that every sum is exact. They rise in the order of the tiles, so that lists overflow."""
    T, d, F, BLOCK_F = 3, 16, 1500, 64
    tiles = -(-F // BLOCK_F)
    turn = torch.zeros(tiles, dtype=torch.long)
    turn[torch.arange(tiles) * encode_topk.spread(tiles) % tiles] = torch.arange(tiles)
    rank = turn[torch.arange(F) // BLOCK_F] if order == "as visited" else torch.arange(F) // 7
    x = torch.ones(T, d, device=DEVICE)
    x[1] = 0  # all values of this token are equal where nothing rises
    W_enc = randn(d, F).round().to(x)
    b_enc = torch.zeros(F, device=DEVICE) if order == "none" else 50.0 * rank.to(DEVICE)
    values, indices = run("encode_topk", (x, W_enc, b_enc, None, k), "triton")
    expected = reference.encode_topk(x.double(), W_enc.double(), b_enc.double(), None, k)
    assert torch.equal(values.double(), expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.skipif(DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="only for Hopper GPUs")
@pytest.mark.parametrize(("T", "F"), [(5, 520), (130, 1024)] if DEVICE.type == "cuda" else [(5, 520)])
@pytest.mark.parametrize("transposed", [False, True])
def test_bulk_copies_find_the_same_keys(transposed, T, F):
    """With and without a tile that reaches past the last token or feature, and with an infinite number in ``x``."""
    x, W_enc, b_enc, _, _ = cast("encode_topk", cases.encode_topk(T, 72, F, 13), torch.bfloat16)
    x[1, 3] = torch.inf
    W_enc = W_enc.T.contiguous().T if transposed else W_enc
    for config in tuning.offered(encode_topk.BULK):
        plain = {name: value for name, value in config.items() if name != "programs"}
        found, expected = (
            encode_topk.largest(x, W_enc, b_enc, 13, tiles)[:, :13].sort().values for tiles in (config, plain)
        )
        assert torch.equal(found, expected)


def test_which_tensors_bulk_copies_can_read():
    x = torch.zeros(16, 64, dtype=torch.bfloat16)
    assert encode_topk.copyable(x)
    assert encode_topk.copyable(x[:, 8:40])
    assert not any(map(encode_topk.copyable, (x.float(), x.T, x[:, 4:40], x[:, ::2], x[:1].expand(16, 64))))
    assert not encode_topk.copyable(torch.zeros(16, 63, dtype=torch.bfloat16))


SAES = [(768, 49152, 128), (1024, 32768, 32), (192, 12288, 64), (768, 24576, 1), (768, 16384, 4096)]


@pytest.mark.parametrize(("d", "F", "k"), SAES[:3])
def test_lists_need_a_twentieth_of_the_memory_of_dense_codes(d, F, k):
    capacity = encode_topk.list_length(d, F, k, BLOCK_F=128, itemsize=2)
    assert 8 * capacity + 2 * d + 12 <= 0.05 * 4 * F


@pytest.mark.parametrize("BLOCK_F", [64, 256])
@pytest.mark.parametrize(("d", "F", "k"), SAES)
def test_panels_fit_for_any_order_of_features(d, F, k, BLOCK_F):
    """There are few panels, and no panel adds more keys than a list has room for."""
    capacity, tiles = encode_topk.list_length(d, F, k, BLOCK_F, itemsize=2), F // BLOCK_F
    panels = encode_topk.panels(F, k, capacity, BLOCK_F)
    assert (panels[0], panels[-1][1]) == ((0, capacity // BLOCK_F), tiles)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(panels))
    assert len(panels) <= 8 or k > F // 8
    order = torch.arange(tiles) * encode_topk.spread(tiles) % tiles
    assert order.unique().numel() == tiles
    noise, rising = torch.randn(F, generator=torch.Generator().manual_seed(0)), torch.arange(F) / F
    nested = 3.0 * (torch.arange(F) < 2048)
    for pre in (noise, noise + 2 * rising, noise - 2 * rising, noise + nested):
        visited = pre.view(tiles, BLOCK_F)[order]
        for first, last in panels[1:]:
            kth = visited[:first].flatten().topk(k).values[-1]
            assert k + (visited[first:last] > kth).sum() <= capacity


# Tuning ---------------------------------------------------------------------------------------------------------------

TUNED = {  # {name of a tuned launch: (its op, its inputs)}
    "encode_topk": ("encode_topk", cases.encode_topk(5, 70, 401, 13)),
    "encode_project": ("encode_project", cases.encode_project("relu", 5, 40, 150)),
    "project": ("project", cases.project(5, 300, 77, 40)),
    "relevancy": ("relevancy", cases.relevancy(3, 2, 2, 50, 32)),
    "relevancy, one row": ("relevancy", cases.relevancy(1, 2, 2, 50, 32)),
    "gated_relevancy": ("gated_relevancy", cases.gated_relevancy(3, 2, 2, 50, 32, 49, 33, 77, 13)),
    "gated_relevancy, one row": ("gated_relevancy", cases.gated_relevancy(1, 2, 2, 50, 32, 49, 33, 77, 13)),
}
MOST = {torch.float32: 1e-5, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("kernel", TUNED)
def test_every_candidate_is_right(kernel, dtype, monkeypatch):
    """The candidates of ``kernel``, one after another. Other kernels that it launches use their first candidate."""
    op, arguments = TUNED[kernel]
    seen, number = {}, 0

    def choose(name, like, sizes, candidates, run):
        if name not in (kernel, "log_sum_exp"):
            return tuning.offered(candidates)[0]
        seen[name] = len(candidates)
        config = candidates[number % len(candidates)]
        return {key: value for key, value in config.items() if key != "cards"}

    monkeypatch.setattr(tuning, "choose", choose)
    given = cast(op, arguments, dtype)
    check(op, given, "triton", MOST[dtype])
    for number in range(1, max(seen.values())):  # noqa: B007
        check(op, given, "triton", MOST[dtype])
    assert kernel in seen
