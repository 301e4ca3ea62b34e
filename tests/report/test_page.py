"""The page, figure and overlay show the results, and no name can inject HTML."""

import pandas as pd
import torch
from PIL import Image

from fastfg.report import save_figure, save_overlay, write_page
from fastfg.report.figure import FigureRow
from fastfg.report.overlay import displayed
from fastfg.study import paired, summarize

EVIL = "<script>alert(1)</script>"


def figure(path):
    row = FigureRow("one", torch.rand(16, 16, 3), torch.rand(4, 4), torch.rand(4, 4), {"saco": 0.5}, {"saco": 0.25})
    save_figure(path, [row, row], "Title", ("vanilla", "gated"))
    return path


def test_names_are_escaped(tmp_path):
    scores = pd.DataFrame(
        [{"image": EVIL, "variant": v, EVIL: 0, "saco": s} for v in ("vanilla", EVIL) for s in (0.1, 0.25)]
    )
    table = pd.DataFrame([{"index": i % 2, "variant": v, EVIL: i} for i, v in enumerate(["a", "a", EVIL, EVIL])])
    write_page(
        tmp_path / "report.html",
        title=EVIL,
        subtitle=EVIL,
        summary=summarize(scores, EVIL, metrics=["saco", EVIL]),
        scores=scores,
        errors=pd.DataFrame([{EVIL: EVIL, "message": EVIL}]),
        figure=figure(tmp_path / "figure.png"),
        figure_caption=f'"{EVIL}',
        settings={EVIL: EVIL},
        notes=[EVIL],
        against=EVIL,
        paired=paired(table, against=EVIL),
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "0.2500" in page
    assert 'src="data:image/png;base64,' in page
    assert "Which differences are real" in page
    assert "http" not in page  # it needs no network


def test_wide_tables_scroll_and_have_headings(tmp_path):
    scores = pd.DataFrame([{"image": "x" * 250, "variant": v, "saco": 0.1} for v in ("vanilla", "y" * 250)])
    write_page(
        tmp_path / "report.html",
        title="z" * 250,
        subtitle="",
        summary=summarize(scores),
        scores=scores,
        errors=pd.DataFrame([{"image": "x" * 250, "message": "the map is constant"}]),
        figure=figure(tmp_path / "figure.png"),
        figure_caption="",
        settings={"s" * 250: "t" * 250},
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<table") == page.count('<div class="wide"><table') == 4
    for heading in ("variant", "image", "message"):
        assert f">{heading}</th>" in page


def test_figure_and_overlay_are_pictures(tmp_path):
    with Image.open(figure(tmp_path / "figure.png")) as image:
        assert image.width > 800
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
