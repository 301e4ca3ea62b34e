"""The area by hand."""

import pytest
import torch

from fastfg.metrics import area


def test_area_by_hand():
    assert float(area([1.0, 0.5, 0.0])) == 1.0
    assert float(area([0.9, 0.9])) == pytest.approx(0.9)
    assert area(torch.ones(2, 3, 5)).tolist() == [[4.0] * 3] * 2
    assert area([1.0, torch.nan, 0.0]).isnan()
    with pytest.raises(ValueError, match="curve: expected .* got \\[1\\]"):
        area([1.0])
