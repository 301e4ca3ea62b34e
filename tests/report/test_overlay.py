"""Overlays: the plain picture where the heatmap is 0, and an error for NaN."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastfg.report import save_overlay


def test_a_heatmap_of_zeros_does_not_change_the_picture(tmp_path):
    picture = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0))
    save_overlay(tmp_path / "a.png", picture, torch.zeros(4, 6))
    expected = (picture.double() * 255).round().numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)


def test_a_heatmap_with_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="heat: expected finite values, got NaN or infinity"):
        save_overlay(tmp_path / "a.png", torch.zeros(4, 6, 3), torch.full((4, 6), torch.nan))
    assert not (tmp_path / "a.png").exists()
