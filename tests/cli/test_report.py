"""``fastfg report`` makes a page of what a folder holds, and says in one line what is missing."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fastfg.cli import main
from fastfg.study.report_folder import folder_contents
from tests.report import toy
from tests.report.reading import Page


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("fastfg.report.page.render", lambda chart, theme, kind: b"")


def evaluated(folder, variants=("vanilla", "gated", "random")):
    """A folder as ``fastfg evaluate`` leaves it."""
    folder.mkdir()
    table = toy.scores(8).query("variant in @variants").rename(columns={"image": "key"}).drop(columns="index")
    table.insert(0, "path", "photographs/" + table["key"])
    table.to_parquet(folder / "scores.parquet", index=False)
    pd.DataFrame([{"path": "<b>.jpg", "message": "truncated"}]).to_csv(folder / "errors.csv", index=False)
    marker = {"fastfg": "1.2", "command": "evaluate", "settings": {"model": "vit_tiny"}}
    (folder / "fastfg.json").write_text(json.dumps(marker))
    return folder


def test_scores_become_a_page(tmp_path, capsys):
    folder = evaluated(tmp_path / "scores")
    assert main(["report", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings == [f"h-{name}" for name in ("answer", "table", "difference", "scores", "settings", "errors")]
    (sentence,) = [text for text in page.texts if text.startswith(("gated beats", "No improvement can be claimed"))]
    assert sentence in said
    assert "&lt;b&gt;.jpg" in text
    assert {"vit_tiny", "fastfg evaluate"} <= {text.strip() for text in page.texts}
    assert (folder / "tables" / "paired-vanilla.csv").exists()


def test_the_answer_names_the_strongest_control(tmp_path):
    contents = folder_contents(evaluated(tmp_path / "scores"))
    claim = contents.claims[0]
    assert set(contents.paired) == {"vanilla", "gated"}
    assert claim.holds
    assert "gated beats vanilla and every control by SRG" in claim.sentence
    assert "n = 8" in claim.sentence
    assert len(claim.conditions) == 9
    failed = [c for c in claim.conditions if c.holds is False]
    assert all("no real difference" in c.detail or "worse" in c.detail for c in failed)


def test_a_folder_without_controls_claims_nothing(tmp_path):
    claim = folder_contents(evaluated(tmp_path / "scores", ("vanilla", "gated"))).claims[0]
    assert claim.holds is False
    assert "No improvement can be claimed: no control was judged" in claim.sentence


@pytest.mark.parametrize(
    ("variants", "sentence"),
    [
        (("vanilla",), "One variant was judged, vanilla: there is nothing to compare it with."),
        (("random", "no SAE"), "than no SAE"),
    ],
)
def test_nothing_is_claimed_without_a_gate(tmp_path, variants, sentence):
    claim = folder_contents(evaluated(tmp_path / "scores", variants)).claims[0]
    assert claim.holds is None
    assert sentence in claim.sentence or "No real difference" in claim.sentence


def test_pictures_of_attribute(tmp_path, capsys):
    folder, maps = evaluated(tmp_path / "scores"), tmp_path / "maps"
    maps.mkdir()
    for i in range(2):
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(maps / f"{i}.png")
    rows = [(f"p/{i}", f"image-00{i}", f"{i}.png" if i < 2 else None, 1, i % 2, 0.75) for i in range(3)]
    columns = ["path", "key", "overlay", "target", "predicted", "probability"]
    pd.DataFrame(rows, columns=columns).to_csv(maps / "attributions.csv", index=False)
    assert main(["report", str(folder), "--maps", str(maps), "--out", str(tmp_path / "page")]) == 0
    page = Page((tmp_path / "page" / "report.html").read_text(encoding="utf-8"))
    images = page.data["images"]
    assert [image["key"] for image in images] == ["image-000", "image-001"]
    assert images[1]["explained"] == "class 1 with probability 0.75"
    assert [v["name"] for v in page.data["variants"]] == ["vanilla", "gated", "random"]
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "folder: expected a folder with scores.parquet, as fastfg evaluate writes it, got"),
        (b"not a table", "folder: expected a table in"),
        (pd.DataFrame({"a": [1]}), "folder: expected the columns variant and key in"),
    ],
)
def test_what_is_no_folder_of_scores(tmp_path, capsys, content, message):
    if isinstance(content, bytes):
        (tmp_path / "scores.parquet").write_bytes(content)
    elif content is not None:
        content.to_parquet(tmp_path / "scores.parquet")
    assert main(["report", str(tmp_path)]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report.html").exists()
