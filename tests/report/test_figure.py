"""The figure and the overlay are pictures, and the differences of all rows have one scale."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastfg.report import save_figure, save_overlay
from fastfg.report.figure import _figure, caption
from fastfg.report.names import Names
from fastfg.report.overlay import displayed
from tests.report import toy


def test_one_scale_for_all_rows(tmp_path):
    contents = toy.full(3, explained=0)
    first = contents.images[0]
    near = first.maps["vanilla"].copy()
    near[0, 0] *= 1.001  # a difference of nearly nothing
    images = [replace(first, maps=first.maps | {"gated": near}), *contents.images[1:]]
    figure = _figure(Names(replace(contents, images=images)))
    rows = np.reshape(figure.axes[: 3 * 6], (3, 6))
    limits = {axis.images[1].get_clim() for axis in rows[:, 3]}
    ((low, high),) = limits
    largest = max(float(np.abs(axis.images[1].get_array()).max()) for axis in rows[:, 3])
    assert (low, high) == pytest.approx((-largest, largest))
    assert float(np.abs(rows[0, 3].images[1].get_array()).max()) < 0.1 * high
    assert [axis.get_title() for axis in rows[0]] == [
        "photograph",
        "vanilla",
        "gated",
        "difference",
        "no SAE",
        "random",
    ]
    assert len(figure.axes) == 3 * 6 + 2  # and two colour bars
    save_figure(tmp_path / "figure.png", contents)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 1500


def test_captions_name_class_and_probability():
    image = replace(toy.images(["a"])[0], label="cell", predicted="defect", probability=0.75)
    assert caption(image) == "a\nclass: cell\npredicted: defect, p = 0.75"
    assert caption(replace(image, key="x" * 99, label=None, predicted=None)) == "…" + "x" * 33


def test_many_images_are_those_at_both_ends(monkeypatch):
    monkeypatch.setattr("fastfg.report.figure.MOST_ROWS", 6)
    monkeypatch.setattr("fastfg.report.figure.AT_EACH_END", 2)
    contents = toy.full(9, explained=0)
    wide = contents.scores.pivot(index="image", columns="variant", values="srg")
    order = (wide["gated"] - wide["vanilla"]).sort_values(ascending=False).index
    figure = _figure(Names(contents))
    shown = [axis.get_xlabel().split("\n")[0] for axis in figure.axes[: 4 * 6 : 6]]
    assert shown == [*order[:2], *order[-2:]]


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="images: expected images with the maps of two variants, got none"):
        save_figure(tmp_path / "figure.png", replace(toy.full(2), images=[]))


def test_the_overlay_is_a_picture(tmp_path):
    picture = displayed(torch.randn(3, 16, 24), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert picture.shape == (16, 24, 3)
    heat = torch.zeros(16, 24)
    heat[0, 0] = 1
    save_overlay(tmp_path / "overlay.png", picture, heat)
    with Image.open(tmp_path / "overlay.png") as image:
        assert image.size == (24, 16)
        unlit = torch.tensor(list(image.tobytes()), dtype=torch.uint8).reshape(16, 24, 3)[5, 5]
    assert (unlit.float() / 255 - picture[5, 5]).abs().max() < 0.01


def test_displayed_undoes_the_normalisation():
    pixels = torch.rand(3, 4, 4)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    image = (pixels - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    torch.testing.assert_close(displayed(image, mean.tolist(), std.tolist()), pixels.permute(1, 2, 0))
    grey = displayed(torch.randn(1, 4, 4), None, None)
    assert grey.shape == (4, 4, 3)
    assert grey.amin() == 0
    assert grey.amax() == 1
