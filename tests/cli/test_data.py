"""``fastfg data prepare`` and ``fastfg finetune``, as a user calls them."""

import shlex

import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import save_file

import fastfg
from fastfg.cli import main
from fastfg.cli.data import EXAMPLES, TITLES
from fastfg.data import class_counts, read_manifest
from fastfg.study.demo.cells import load_cells
from tests.tools import installed


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def photos(tmp_path):
    """20 images in two classes: photograph ``p<patient>-<number>``."""
    for i in range(20):
        file = tmp_path / "photos" / ("dark" if i < 10 else "light") / f"p{i // 2}-{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 12 * i).save(file)
    return tmp_path / "photos"


def test_a_folder_of_classes(photos, tmp_path, capsys):
    (photos / "dark" / "notes.txt").write_text("")
    out = tmp_path / "out"
    assert main(["data", "prepare", "folder", str(photos), str(out), "--group-pattern", "/(p[0-9]+)-"]) == 0
    text = said(capsys)
    assert "20 images, 0 masks; 10 groups, none in two splits" in text
    assert "Not in the manifest: 1 path, see" in text
    table = read_manifest(out / "manifest.parquet")
    assert table.groupby("group")["split"].nunique().max() == 1
    assert pd.read_csv(out / "dropped.csv")["path"].tolist() == [str(photos / "dark" / "notes.txt")]
    assert set(table["group"]) == {f"p{i}" for i in range(10)}
    assert main(["data", "prepare", "folder", str(photos), str(tmp_path / "b")]) == 0
    assert "no groups: whether the splits keep patients, or whatever belongs together, apart is not known" in said(
        capsys
    )


def test_copies_can_be_moved(photos, tmp_path, capsys):
    options = ["--copy", "--csv", "--seed", "4"]
    assert main(["data", "prepare", "folder", str(photos), str(tmp_path / "out"), *options]) == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    table = read_manifest(tmp_path / "moved" / "manifest.csv")
    assert all(
        path == f"{tmp_path}/moved/images/{key}.png" for key, path in zip(table["key"], table["path"], strict=True)
    )
    assert main(["data", "prepare", "folder", str(photos), str(tmp_path / "c"), "--not-trained",
                 str(tmp_path / "moved/manifest.csv"), "--seed", "5"]) == 0  # fmt: skip
    assert "that" in said(capsys)
    left = read_manifest(tmp_path / "c" / "manifest.parquet")
    judged = left.loc[left["split"] != "train", "key"]
    assert not set(judged) & set(table.loc[table["split"] == "train", "key"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-pattern", "p[0-9"], "group-pattern: expected a regular expression, got 'p[0-9'"),
        (["--group-pattern", "p"], "group-pattern: expected a group in parentheses, got 'p'"),
        (["--group-pattern", "(x)"], "group: expected a name for each image, got ''"),
        (["--test", "1.5"], "test: expected a share of at least 0 and below 1, got 1.5"),
    ],
)
def test_wrong_options_are_one_line(photos, tmp_path, capsys, options, message):
    assert main(["data", "prepare", "folder", str(photos), str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_published_layouts_name_where_they_are_published(tmp_path, capsys):
    for name in ("covid-qu-ex", "hyperkvasir", "imagenet", "elpv"):
        assert main(["data", "prepare", name, str(tmp_path), str(tmp_path / "out")]) == 1
        assert "published" in (error := capsys.readouterr().err) or "github.com" in error
    with pytest.raises(SystemExit):
        main(["data", "prepare", "mnist", "a", "b"])
    assert "expected" not in capsys.readouterr().out


def test_the_example_of_help_runs(tmp_path, monkeypatch, capsys):
    installed(load_cells)
    monkeypatch.chdir(tmp_path)
    assert set(EXAMPLES) == set(TITLES)
    words = shlex.split(EXAMPLES["elpv"])
    assert words[0] == "fastfg"
    assert main([*words[1:], "--test", "300", "--validation", "100"]) == 0
    assert "2,624" not in said(capsys)
    counts = class_counts(read_manifest("data/elpv/manifest.parquet"))
    assert counts.sum().to_dict() == {"train": 1674, "validation": 100, "test": 300}
    with pytest.raises(SystemExit):
        main(["data", "prepare", "elpv", "--help"])
    assert EXAMPLES["elpv"] in said(capsys)


def test_finetune(photos, tmp_path, capsys):
    model, _ = fastfg.models.load("test_vit", pretrained=False, num_classes=5, img_size=32)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert (
        main(["data", "prepare", "folder", str(photos), str(tmp_path / "m"), "--validation", "0.3", "--test", "0.3"])
        == 0
    )
    options = ["--model", "test_vit", "--weights", str(tmp_path / "w.safetensors"), "--img-size", "32", "--epochs", "2"]
    command = [
        "finetune",
        str(tmp_path / "m/manifest.parquet"),
        *options,
        "--head-only",
        "--out",
        str(tmp_path / "out"),
    ]
    capsys.readouterr()
    assert main(command) == 0
    text = said(capsys)
    assert "test: balanced accuracy" in text
    assert "(always 'dark'" in text or "(always 'light'" in text
    assert "Wrote" in text
    assert main(command) == 0  # it is finished
    weights = str(tmp_path / "out/weights.safetensors")
    explain = [
        "attribute",
        str(photos / "dark"),
        "--model",
        "test_vit",
        "--weights",
        weights,
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(explain) == 0
    assert len(list((tmp_path / "x").glob("*.npy"))) == 10
    capsys.readouterr()
    assert main([*command, "--lr", "0.5"]) == 1
    assert "out: expected the settings of the run in" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "o2"), "--crop-scale", "0.9", "0.1"]) == 1
    assert "crop_scale: expected 0 < low <= high <= 1" in capsys.readouterr().err
