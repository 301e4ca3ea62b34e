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


def test_what_is_better_than_the_method_is_said(tmp_path):
    folder = evaluated(tmp_path / "scores", ("vanilla", "gated", "random"))
    table = pd.read_parquet(folder / "scores.parquet")
    better = table[table["variant"] == "gated"].assign(variant="rollout", srg=lambda rows: rows["srg"] + 0.2)
    pd.concat([table, better]).to_parquet(folder / "scores.parquet")
    claim = folder_contents(folder).claims[0]
    assert claim.holds
    assert "is worse than rollout by SRG" in claim.sentence
    claim = folder_contents(folder, controls=["random", "rollout"]).claims[0]
    assert not claim.holds
    assert "does not beat vanilla and every control" in claim.sentence


def test_the_method_may_have_any_name(tmp_path):
    folder = evaluated(tmp_path / "scores")
    table = pd.read_parquet(folder / "scores.parquet").replace({"variant": {"gated": "mine"}})
    table.to_parquet(folder / "scores.parquet")
    contents = folder_contents(folder, method="mine")
    assert contents.claims[0].sentence.startswith("mine beats vanilla and every control")
    assert {one.name: one.role for one in contents.variants}["mine"] == "method"
    assert folder_contents(folder).claims[0].holds is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "min"], "method: expected a variant, one of ['gated', 'random'], got 'min'"),
        (["--method", "vanilla"], "method: expected a variant, one of ['gated', 'random'], got 'vanilla'"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--controls", "rondom"], "controls: expected variants among ['random'], got 'rondom'"),
        (["--controls", "gated"], "controls: expected variants among ['random'], got 'gated'"),
        (["--controls", "random", "random"], "controls: expected different variants, got ['random', 'random']"),
    ],
)
def test_variants_that_are_not_there(tmp_path, capsys, options, message):
    folder = evaluated(tmp_path / "scores")
    assert main(["report", str(folder), *options]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        (
            ("gated", "random"),
            {"method": "random"},
            "method: expected a table with 'vanilla', which a method is compared",
        ),
        (("gated", "random"), {"controls": ["random"]}, "controls: expected a table with 'vanilla', which a method is"),
        (
            ("vanilla", "random"),
            {"controls": ["random"]},
            r"controls: expected a method .* one of \['random'\], got none",
        ),
        (("vanilla", "random"), {"method": "gated"}, r"method: expected a variant, one of \['random'\], got 'gated'"),
    ],
)
def test_what_cannot_be_answered_is_said(tmp_path, variants, options, message):
    with pytest.raises(ValueError, match=message):
        folder_contents(evaluated(tmp_path / "scores", variants), **options)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("fastfg.json", {"settings": 3}, "fastfg.json: expected a JSON object as settings, got 3"),
        ("fastfg.json", {"versions": [1]}, "fastfg.json: expected a JSON object as versions, got [1]"),
        ("fastfg.json", [], "fastfg.json: expected a JSON object, got []"),
        ("config.json", {"evaluate": 4}, "config.json: expected a JSON object as evaluate, got 4"),
        ("config.json", {"evaluate": {"arguments": 4}}, "config.json: expected a JSON object as arguments, got 4"),
        ("errors.csv", None, "errors.csv, got No columns"),
        ("attributions.csv", None, "maps: expected a table of fastfg attribute in"),
        ("attributions.csv", None, "attributions.csv, got No columns"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, capsys, file, content, message):
    folder = evaluated(tmp_path / "scores")
    (folder / file).write_text("" if content is None else json.dumps(content))
    assert main(["report", str(folder)]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("empty", ["", None])
def test_an_image_whose_group_is_empty_is_one_by_itself(tmp_path, empty):
    folder = evaluated(tmp_path / "scores")
    table = pd.read_parquet(folder / "scores.parquet")
    before = folder_contents(folder).paired["vanilla"]
    table["group"] = pd.Series([empty] * len(table), dtype=object)
    table.to_parquet(folder / "scores.parquet")
    pd.testing.assert_frame_equal(folder_contents(folder).paired["vanilla"], before)
    table.loc[table["key"] < "image-003", "group"] = "patient"
    table.to_parquet(folder / "scores.parquet")
    assert set(folder_contents(folder).paired["vanilla"]["groups"]) == {6}  # of 8 images, three of one patient


def test_variants_that_explain_different_classes(tmp_path, capsys):
    folder = evaluated(tmp_path / "scores")
    table = pd.read_parquet(folder / "scores.parquet")
    table.loc[table["variant"] == "random", "target"] = 7
    table.to_parquet(folder / "scores.parquet")
    assert main(["report", str(folder)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "scores: expected the same target in all variants of an image, got 0 in 'vanilla' and 7 in 'random'" in said
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("columns", [["path"], ["path", "index"], ["index"]])
def test_what_tells_images_apart(tmp_path, columns):
    folder = evaluated(tmp_path / "scores", ("vanilla",))
    table = pd.read_parquet(folder / "scores.parquet").assign(index=range(8))
    table[[*columns, "key", "variant", "srg"]].to_parquet(folder / "scores.parquet")
    assert folder_contents(folder).title == "Scores of 8 images"


def test_a_demo_keeps_its_page(tmp_path, capsys):
    folder = evaluated(tmp_path / "demo")
    (folder / "fastfg.json").write_text(json.dumps({"fastfg": "1.2", "command": "demo"}))
    assert main(["report", str(folder)]) == 1
    assert "expected one of fastfg evaluate, got that of a demo" in " ".join(capsys.readouterr().err.split())


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
    rows = [(f"p/{i}", f"image-00{i}", f"{i}.png" if i < 2 else None, i % 2, i % 2, 0.75) for i in range(3)]
    columns = ["path", "key", "overlay", "target", "predicted", "probability"]
    pd.DataFrame(rows, columns=columns).to_csv(maps / "attributions.csv", index=False)
    assert main(["report", str(folder), "--maps", str(maps), "--out", str(tmp_path / "page")]) == 0
    page = Page((tmp_path / "page" / "report.html").read_text(encoding="utf-8"))
    images = page.data["images"]
    assert [image["key"] for image in images] == ["image-000", "image-001"]
    assert images[1]["explained"] == "class 1 with probability 0.75"
    assert [v["name"] for v in page.data["variants"]] == ["vanilla", "gated", "random"]
    assert not (folder / "report.html").exists()


def test_maps_that_are_no_maps(tmp_path):
    folder, maps = evaluated(tmp_path / "scores"), tmp_path / "maps"
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"maps: expected a folder with attributions\.csv, .* got .*maps$"):
            folder_contents(folder, maps=maps)
        maps.mkdir(exist_ok=True)
    Image.new("RGB", (3, 2)).save(maps / "0.png")
    row = {"path": "p", "key": "image-000", "overlay": "0.png", "target": 0, "predicted": 1, "probability": "high"}
    pd.DataFrame([row]).to_csv(maps / "attributions.csv", index=False)
    with pytest.raises(ValueError, match=r"maps: expected probabilities in .*attributions\.csv, got 'high'"):
        folder_contents(folder, maps=maps)
    pd.DataFrame([row | {"overlay": "1.png", "probability": 0.5}]).to_csv(maps / "attributions.csv", index=False)
    with pytest.raises(FileNotFoundError, match=r"maps: expected the picture .*1\.png, as .*attributions\.csv says"):
        folder_contents(folder, maps=maps)
    (maps / "1.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"maps: expected a picture in .*1\.png"):
        folder_contents(folder, maps=maps)


def test_maps_of_another_class_than_the_scores(tmp_path):
    folder, maps = evaluated(tmp_path / "scores"), tmp_path / "maps"
    maps.mkdir()
    Image.new("RGB", (3, 2)).save(maps / "0.png")
    row = {"path": "p", "key": "image-001", "overlay": "0.png", "target": 2, "predicted": 2, "probability": 0.5}
    pd.DataFrame([row]).to_csv(maps / "attributions.csv", index=False)
    message = "maps: expected maps of the classes that were judged, got class 2 for image 'image-001', and 1 in scores"
    with pytest.raises(ValueError, match=message):
        folder_contents(folder, maps=maps)
    table = pd.read_parquet(folder / "scores.parquet")
    for unknown in (table.drop(columns="target"), table.assign(target=None), table.assign(target="cat")):
        unknown.to_parquet(folder / "scores.parquet")
        assert len(folder_contents(folder, maps=maps).images) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "folder: expected a folder with scores.parquet, as fastfg evaluate writes it, got"),
        (b"not a table", "folder: expected a table in"),
        (pd.DataFrame({"a": [1]}), "folder: expected the columns variant, and key and path (or image), in"),
        (
            pd.DataFrame({"variant": ["a"], "key": ["b"], "srg": [1.0]}),
            "folder: expected the columns variant, and key and path (or image), in",
        ),
        (
            pd.DataFrame({"variant": ["a"], "image": ["b"], "srg": [1.0], "mine": [1.0]}),
            "folder: expected columns of metrics alone in",
        ),
        (
            pd.DataFrame({"variant": ["a"], "image": ["b"], "srg": ["x"]}),
            "folder: expected columns of metrics alone in",
        ),
        (pd.DataFrame({"variant": [], "image": [], "srg": []}), "scores.parquet, got a table without rows"),
        (pd.DataFrame({"variant": ["a"], "image": ["b"]}), "folder: expected a column of a metric in"),
        (
            pd.DataFrame({"variant": ["a", None], "image": ["b", "b"], "srg": [1.0, 2.0]}),
            "folder: expected names of variants in",
        ),
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
