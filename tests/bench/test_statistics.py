"""The simulation of the paired statistics, small: false alarms, coverage and power are near what they should be."""

import pytest

from bench.statistics import Design, simulate


@pytest.mark.parametrize("design", [Design("normal", 12), Design("normal", 40), Design("normal", 40, 15)], ids=str)
def test_alarms_coverage_and_power(design):
    found = simulate(design, 1_000, seed=1, patterns=999)
    assert 0.035 <= found["alarms"] <= 0.065  # within 2 standard errors of 5%
    assert 0.93 <= found["covered"] <= 0.97
    assert 0.76 <= found["power"] <= 0.84
    assert found["family"] <= 0.065
