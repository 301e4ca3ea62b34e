"""Every op at shapes that hypothesis draws, and in every configuration that tuning may choose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfg import reference
from tests.kernels.parity_gated import check_gated, gated_block
from tests.kernels.tools import (
    activation,
    block,
    check,
    check_topk,
    codes,
    draw,
    encoder,
    poisoned,  # noqa: F401
)

# isort: split
from fastfg.kernels import encode_project, encode_topk, gate, project, relevancy, tuning

few = settings(max_examples=8, deadline=None, derandomize=True, database=None)
tokens, width, features = st.integers(1, 9), st.integers(1, 70), st.integers(1, 200)
names = st.sampled_from(encode_project.ACTIVATIONS)


@few
@given(C=st.integers(1, 20), B=st.integers(1, 3), H=st.integers(1, 3), N=st.integers(1, 40), dh=st.integers(1, 48))
def test_relevancy_at_drawn_shapes(C, B, H, N, dh):
    check(relevancy.relevancy, reference.relevancy, *block(C, N, dh, B, H))


@few
@given(C=st.integers(1, 20), N=st.integers(7, 40), prefix=st.integers(0, 6), d=width, K=st.integers(1, 30))
def test_gated_relevancy_at_drawn_shapes(C, N, prefix, d, K):
    check_gated(*gated_block(C, N, prefix, d=d, F=30, K=K), allowed=1e-4)  # a MAD of few scores magnifies their error


@few
@given(T=tokens, d=width, F=features, share=st.floats(0, 1))
def test_project_at_drawn_shapes(T, d, F, share):
    K = round(share * F)
    check(project.project, reference.project, draw(T, d), draw(F, d, seed=1), *codes(T, F, K))


@few
@given(rows=st.integers(1, 4), P=st.integers(1, 300))
def test_gate_at_drawn_shapes(rows, P):
    check(gate.gate, reference.gate, draw(rows, P), 0.7, 5.0)


@few
@given(T=tokens, d=width, F=st.integers(1, 400), share=st.floats(0, 1))
def test_encode_topk_at_drawn_shapes(T, d, F, share):
    check_topk(encode_topk.encode_topk, *encoder(T, d, F), max(1, round(share * F)))


@few
@given(T=tokens, d=width, F=features, name=names)
def test_encode_project_at_drawn_shapes(T, d, F, name):
    x, W_enc, b_enc, _ = encoder(T, d, F)
    arguments = (x, draw(T, d, seed=4), W_enc, b_enc, draw(F, d, seed=5), activation(name, F))
    check(encode_project.encode_project, reference.encode_project, *arguments)


RUNS = {
    "encode_topk": lambda dtype: check_topk(encode_topk.encode_topk, *encoder(5, 70, 401, dtype), 13),
    "encode_project": lambda dtype: check(
        encode_project.encode_project,
        reference.encode_project,
        *(draw(5, 40, dtype=dtype), draw(5, 40, dtype=dtype, seed=4), *encoder(5, 40, 150, dtype)[1:3]),
        *(draw(150, 40, dtype=dtype, seed=5), activation("relu", 150)),
    ),
    "project": lambda dtype: check(
        project.project,
        reference.project,
        *(draw(5, 300, dtype=dtype), draw(77, 300, dtype=dtype, seed=1), *codes(5, 77, 40, dtype)),
    ),
    "relevancy": lambda dtype: check(relevancy.relevancy, reference.relevancy, *block(3, 50, 32, dtype=dtype)),
    "relevancy, one row": lambda dtype: check(relevancy.relevancy, reference.relevancy, *block(1, 50, 32, dtype=dtype)),
    "gated_relevancy": lambda dtype: check_gated(*gated_block(3, 50, 1, dtype), allowed=2**-14),
    "gated_relevancy, one row": lambda dtype: check_gated(*gated_block(1, 50, 1, dtype), allowed=2**-14),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", RUNS)
def test_every_candidate_is_right(kernel, dtype, monkeypatch):
    """Those of ``kernel`` one after another; other kernels that it launches take their first."""
    seen, number = {}, 0

    def choose(name, like, sizes, candidates, run):
        if name not in (kernel, "log_sum_exp"):
            return tuning.offered(candidates)[0]
        seen[name] = len(candidates)
        config = candidates[number % len(candidates)]
        return {key: value for key, value in config.items() if key != "cards"}

    monkeypatch.setattr(tuning, "choose", choose)
    RUNS[kernel](dtype)
    for number in range(1, max(seen.values())):  # noqa: B007
        RUNS[kernel](dtype)
    assert kernel in seen
