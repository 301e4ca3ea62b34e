"""Overlays: the plain picture where the heatmap is 0, and an error for NaN."""

from pathlib import Path

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


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a", "PNG")])
def test_a_picture_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch, name, kind):
    file, arguments = tmp_path / name, (torch.zeros(4, 6, 3), torch.zeros(4, 6))
    save_overlay(file, *arguments)
    assert Image.open(file).format == kind

    def killed(self, target, kind):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    before = file.read_bytes()
    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_overlay(file, *arguments)
    assert file.read_bytes() == before
