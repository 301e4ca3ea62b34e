"""Products in 8 bits: as exact as the format allows for any scale of a row, and the layer is restored afterwards."""

import pytest
import torch
from torch import nn

from fastfg.perturb import Precision
from fastfg.perturb.float8 import Float8Linear, rounded


def test_rows_are_rounded_to_an_eighth_of_their_scale_at_most():
    x = torch.randn(50, 32) * torch.logspace(-6, 6, 50)[:, None]
    x[3] = 0
    numbers, scale = rounded(x)
    back = numbers.float() * scale
    assert torch.equal(back[3], x[3])
    assert ((back - x).abs() <= 2**-4 * x.abs() + scale * 2**-9).all()


def test_a_layer_is_close_and_then_as_it_was():
    layer, x = nn.Linear(64, 48), torch.randn(2, 7, 64)
    exact = layer(x)
    with torch.no_grad(), Float8Linear():
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - exact).norm() / exact.norm() < 0.05
    assert torch.equal(layer(x), exact)


def test_a_layer_whose_sides_do_not_fit_is_left_alone():
    layer, x = nn.Linear(64, 10), torch.randn(3, 64)
    exact = layer(x)
    with torch.no_grad(), Float8Linear():
        assert torch.equal(layer(x), exact)


def test_a_nan_is_seen():
    layer, x = nn.Linear(32, 32), torch.randn(2, 32)
    x[1, 3] = torch.nan
    with torch.no_grad(), Float8Linear():
        found = layer(x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_names():
    with pytest.raises(ValueError, match="precision: expected 'auto' or one of .* got 'int4'"):
        Precision("int4", torch.device("cpu"))
