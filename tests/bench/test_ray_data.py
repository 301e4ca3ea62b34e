"""The figures of ``bench.ray_data`` from times that are worked out by hand."""

import numpy as np
import pytest

from bench.ray_data import figures, per_batch


def test_seconds_per_batch():
    walls, processors = [3.0, 3.0, 5.0, 5.0, 9.0, 9.0], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]  # three batches of two images
    assert per_batch(walls, processors).tolist() == [3.0, 1.0]


def test_medians_over_rounds():
    rounds = [(np.array([2.0, 1.0]), np.array([1.0, 1.0])), (np.array([4.0, 3.0]), np.array([4.0, 2.0]))]
    found = figures([*rounds, (np.array([6.0, 2.0]), np.array([2.0, 4.0]))])
    assert found == pytest.approx(
        {"median": 4, "loop": 2, "processor": 2, "loop processor": 2, "ratio": 2, "processor ratio": 1, "rounds": 3}
    )
