"""Compare a backend's results with the op's reference in float64."""

from __future__ import annotations

import torch

from fastfg import ops, reference
from tests.ops.cases import cast, outputs


def exact(op, arguments):
    """The op's reference on the same values in float64."""
    return outputs(getattr(reference, op)(*cast(op, arguments, torch.float64, arguments[0].device)))


def error(found, expected):
    """The largest error relative to the result's scale. NaN and infinity must be where the reference has them."""
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    known = expected.isfinite()
    torch.testing.assert_close(found[~known], expected[~known], rtol=0, atol=0, equal_nan=True)
    if not known.any():
        return 0.0
    return float((found - expected)[known].abs().max() / expected[known].abs().max().clamp(min=1e-30))


def errors(op, arguments, found, expected):
    """The largest error of each result. Asserts that ``found`` is right in everything that has no error measure."""
    found = outputs(found)
    if op == "encode_topk":
        return errors_of_codes(arguments, *found, expected[0])
    if op == "gated_relevancy":
        return errors_of_steps(arguments, *found, expected[1])
    return [error(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]


def errors_of_codes(arguments, values, indices, expected):
    """The errors of the values and of the choice: the chosen features' exact pre-activations are the K largest."""
    *given, k = cast("encode_topk", arguments, torch.float64, arguments[0].device)
    assert indices.dtype == torch.int64
    assert all(len(row.unique()) == k for row in indices)
    assert bool((values.diff(dim=-1) <= 0).all())
    chosen = reference.preactivations(*given).gather(1, indices)
    return [error(values, expected), error(chosen.relu(), expected)]


def errors_of_steps(arguments, rows, scores, gates, expected_scores):
    """The error of each step, given the result of the step before, because a gate may magnify a score's error."""
    given = cast("gated_relevancy", arguments, torch.float64, arguments[0].device)
    old, q, k, v, dO, scale, *_, kappa, c_max, identity = given
    all_gates = torch.ones_like(old)
    all_gates[..., old.shape[-1] - gates.shape[-1] :] = gates
    expected_gates = reference.gate(scores.double(), kappa[:, None, None], c_max[:, None, None])
    return [
        error(rows, reference.relevancy(old, q, k, v, dO, scale, all_gates, identity)),
        error(scores, expected_scores),
        error(gates, expected_gates.masked_fill(c_max[:, None, None] == 1, 1.0)),
    ]


def run(op, arguments, backend):
    """The result of the public op. Asserts that the op does not change its arguments."""
    kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    result = getattr(ops, op)(*arguments, backend=backend)
    for a, b in zip(arguments, kept, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num())
    return result


def check(op, arguments, backend, most=1e-5):
    """The result. Asserts that its error is at most ``most``."""
    found = run(op, arguments, backend)
    assert max(errors(op, arguments, found, exact(op, arguments))) <= most
    return outputs(found)
