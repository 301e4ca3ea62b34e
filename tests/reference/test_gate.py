"""Equations 4 and 5 by hand."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastfg import reference
from fastfg.reference.gate import lower_median, z_score


def test_by_hand_with_the_lower_median():
    scores = torch.tensor(
        [4.0, 1.0, 2.0, 9.0], dtype=torch.float64
    )  # lower median 2; deviations 2 1 0 7, lower median 1
    expected = [math.exp(math.log(10) * math.tanh(0.5 * (s - 2) / (1.4826 * (1 + 1e-8)))) for s in (4, 1, 2, 9)]
    assert reference.gate(scores, 0.5, 10.0).tolist() == pytest.approx(expected, rel=1e-14)


def test_odd_number_of_patches():
    scores = torch.tensor([[3.0, -1.0, 5.0]], dtype=torch.float64)  # median 3, deviations 0 4 2
    expected = math.exp(math.log(50) * math.tanh((5 - 3) / (1.4826 * (2 + 1e-8))))
    assert float(reference.gate(scores, 1.0, 50.0)[0, 2]) == pytest.approx(expected, rel=1e-14)


def test_no_spread_means_no_gate_at_the_median_and_a_full_one_off_it():
    assert reference.gate(torch.full((2, 7), 3.0), 1.0, 10.0).eq(1).all()
    gates = reference.gate(torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 0.0]), 1.0, 10.0)
    assert gates.tolist() == pytest.approx([1, 1, 1, 1, 10, 0.1])


def test_range_order_and_nan():
    scores = torch.randn(5, 196, dtype=torch.float64)
    gates = reference.gate(scores, 3.0, 50.0)
    assert ((gates >= 1 / 50 * (1 - 1e-12)) & (gates <= 50 * (1 + 1e-12))).all()
    assert ((scores[..., :, None] >= scores[..., None, :]) <= (gates[..., :, None] >= gates[..., None, :])).all()
    assert reference.gate(torch.tensor([1.0, torch.nan, 2.0]), 1.0, 10.0).isnan().all()


def test_many_configurations_at_once():
    scores = torch.randn(2, 3, 9, dtype=torch.float64)
    kappa, c_max = torch.tensor([0.5, 2.0]).double(), torch.tensor([10.0, 50.0]).double()
    both = reference.gate(scores, kappa[:, None, None], c_max[:, None, None])
    for c in range(2):
        torch.testing.assert_close(both[c], reference.gate(scores[c], float(kappa[c]), float(c_max[c])))


class NotDeterministicOnCUDA(TorchFunctionMode):
    """Refuses what torch has no deterministic algorithm for on a GPU, as it does there if one is asked for."""

    NAMES = ("median", "kthvalue", "histc", "bincount", "put_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in self.NAMES, f"{func.__name__} on CUDA does not have a deterministic implementation"
        return func(*args, **(kwargs or {}))


def test_the_median_is_torchs_by_a_deterministic_algorithm():
    random = torch.Generator().manual_seed(0)
    for P in (1, 2, 7, 8):
        x = torch.randn(50, P, generator=random, dtype=torch.float64).round(decimals=0)
        x[:9, P // 2] = torch.tensor([torch.inf, -torch.inf, torch.nan] * 3)
        with NotDeterministicOnCUDA():
            found = lower_median(x)
        assert torch.equal(found.nan_to_num(), x.median(-1, keepdim=True).values.nan_to_num())
        assert torch.equal(found.isnan(), x.median(-1, keepdim=True).values.isnan())
    with NotDeterministicOnCUDA():
        assert reference.gate(x, 1.0, 10.0).shape == x.shape


def test_the_z_scores_by_hand():
    scores = torch.tensor([[4.0, 1.0, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    first, second = z_score(scores).tolist()
    assert first == [(s - 2) / (1.4826 * (1 + 1e-8)) for s in (4, 1, 2, 9)]
    assert second == [0, 0, 0, 0]
    assert z_score(torch.tensor([1.0, float("nan"), 2.0])).isnan().all()
    values = torch.randn(50, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z_score(values), torch.stack([z_score(row) for row in values]))
