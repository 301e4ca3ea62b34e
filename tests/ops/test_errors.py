"""Errors name the argument that is wrong."""

import pytest
import torch

from fastfg import ops
from fastfg.reference import Activation
from tests.ops.cases import TYPICAL, encode_project, randn
from tests.ops.cases import gated_relevancy as gated


def wrong(op, number, value):
    """``op`` on its typical arguments, with another value for the argument at that position."""
    arguments = list(TYPICAL[op]())
    arguments[number] = value
    return lambda: getattr(ops, op)(*arguments)


ZEROS = torch.zeros(49, 13).long()
MESSAGES = [
    (wrong("project", 1, randn(9, 5)), r"W_dec: expected \[F, 33\] \(F d\), got \[9, 5\]"),
    (wrong("decode_topk", 2, randn(9)), r"W_dec: expected \[F, d\] \(F d\), got \[9\]"),
    (wrong("decode_topk", 1, ZEROS[:, 1:]), r"indices: expected \[49, 13\] \(T K\), got \[49, 12\]"),
    (wrong("encode_topk", 4, True), "k: expected an int, got True"),
    (wrong("project", 3, ZEROS[:, 1:]), r"indices: expected \[49, 13\] \(T K\), got \[49, 12\]"),
    (wrong("encode_topk", 4, 1001), "k: expected 1 to 1000, got 1001"),
    (wrong("encode_topk", 4, 0), "k: expected 1 to 1000, got 0"),
    (wrong("encode_topk", 3, randn(32)), r"b_dec: expected \[33\] \(d\), got \[32\]"),
    (wrong("encode_project", 3, randn(7)), r"b_enc: expected \[1000\] \(F\), got \[7\]"),
    (lambda: ops.encode_project(*encode_project("topk", 2, 3, 9)), "activation: expected .* got 'topk'"),
    (wrong("gate", 0, randn(3, 0)), r"scores: expected \[..., P\] with at least one patch, got \[3, 0\]"),
    (wrong("gate", 0, torch.tensor(1.0)), r"scores: expected \[..., P\] with at least one patch, got \[\]"),
    (wrong("relevancy", 1, randn(2, 3, 6, 48)), r"q: expected \[2, H, 50, dh\] \(B H N dh\), got \[2, 3, 6, 48\]"),
    (wrong("relevancy", 6, randn(3, 2, 49)), r"gates: expected \[3, 2, 50\], as rows, got \[3, 2, 49\]"),
    (wrong("relevancy", 7, "none"), "identity: expected one of .'transmm', 'paper'., got 'none'"),
    (wrong("relevancy", 0, randn(3, 2, 50).bfloat16()), "rows: expected float32 or float64, .* got torch.bfloat16"),
    (wrong("gated_relevancy", 0, randn(3, 2, 50).half()), "rows: expected float32 or float64, .* got torch.float16"),
    (wrong("gated_relevancy", 6, randn(1, 49, 33)), r"g: expected \[2, P, d\] \(B P d\), got \[1, 49, 33\]"),
    (wrong("gated_relevancy", 7, randn(9, 5)), r"W_dec: expected \[F, 33\] \(F d\), got \[9, 5\]"),
    (wrong("gated_relevancy", 8, randn(2, 48, 13)), r"values: expected \[2, 49, K\] \(B P K\), got \[2, 48, 13\]"),
    (wrong("gated_relevancy", 9, ZEROS), r"indices: expected \[2, 49, 13\] \(B P K\), got \[49, 13\]"),
    (wrong("gated_relevancy", 10, randn(2)), r"kappa: expected \[3\] \(C\), got \[2\]"),
    (wrong("gated_relevancy", 11, randn(3, 1)), r"c_max: expected \[3\] \(C\), got \[3, 1\]"),
    (wrong("gated_relevancy", 12, "none"), "identity: expected one of .'transmm', 'paper'., got 'none'"),
    (lambda: ops.gated_relevancy(*gated(1, 1, 1, 5, 8, 6, 3, 9, 2)), "g: expected 1 to 5 patches, .* got 6"),
    (lambda: ops.gated_relevancy(*gated(1, 1, 1, 5, 8, 0, 3, 9, 2)), "g: expected 1 to 5 patches, .* got 0"),
]


PARAMETERS = [
    (Activation("jumprelu"), r"threshold: expected \[\] or \[9\] for jumprelu, got None"),
    (Activation("batch_topk"), r"threshold: expected \[\] or \[9\] for batch_topk, got None"),
    (Activation("jumprelu", threshold=torch.zeros(8)), r"threshold: expected \[\] or \[9\] for jumprelu, got \[8\]"),
    (Activation("gated"), r"r_mag: expected \[\] or \[9\] for gated, got None"),
    (
        Activation("gated", r_mag=torch.zeros(9), b_gate=torch.zeros(1)),
        r"b_gate: expected \[\] or \[9\] for gated, got \[1\]",
    ),
]


@pytest.mark.parametrize("backend", ["auto", "reference", "cpp"])
@pytest.mark.parametrize(("activation", "message"), PARAMETERS, ids=[message for _, message in PARAMETERS])
def test_parameters_of_an_activation(activation, message, backend):
    arguments = encode_project("relu", 2, 3, 9)[:5]
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.encode_project(*arguments, activation, backend=backend)


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message for _, message in MESSAGES])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
