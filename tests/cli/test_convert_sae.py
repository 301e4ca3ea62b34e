"""``fastfg convert-sae`` and ``fastfg info --sae``."""

import pytest
import torch

import fastfg
from fastfg.cli import main
from tests.sae.writers import K, save_saev, weights
from tests.tools import random_sae

HEADER = {"schema": 2, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": K}}}}


def test_convert_and_show(tmp_path, capsys):
    save_saev(tmp_path / "in", HEADER, weights())
    out = tmp_path / "layer_4"
    assert main(["convert-sae", str(tmp_path / "in"), str(out), "--site", "resid_post", "--layer", "4"]) == 0
    assert "plugs in: block 4, site resid_post" in capsys.readouterr().out
    expected = fastfg.load_saes(tmp_path / "in", layers=4, site="resid_post")[4]
    (found,) = fastfg.load_saes(out).values()
    assert found.config() == expected.config()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert main(["info", "--sae", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "(saev)" in shown
    assert "topk, k=5, post=none, ranking=value, float64" in shown
    assert "norms of W_dec rows: " in shown
    assert "given: site" in shown
    assert main(["convert-sae", str(tmp_path / "in"), str(out), "--site", "resid_post"]) == 1
    assert "out: expected a new or an empty folder, got" in capsys.readouterr().err


def test_out_must_be_new_or_empty(tmp_path, capsys):
    """An SAE of another library in the same folder could not be told apart from the one that is written."""
    source = tmp_path / "sl" / "layer_1"
    save_saev(source, HEADER, weights())
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    wanted = ["--site", "resid_post", "--layer", "1"]
    assert main(["convert-sae", str(source), str(source), *wanted]) == 1
    error = capsys.readouterr().err
    assert f"out: expected a new or an empty folder, got {source}, which has {', '.join(sorted(before))}" in error
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    file = tmp_path / "a.txt"
    file.touch()
    assert main(["convert-sae", str(source), str(file), *wanted]) == 1
    assert f"out: expected a folder, got {file}, which is a file" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["convert-sae", str(source), str(empty), *wanted]) == 0


def test_show_several_and_thresholds(tmp_path, capsys):
    for block in (2, 3):
        random_sae(32, 100, "batch_topk", threshold=0.5, strict=False).save(tmp_path / f"layer_{block}")
    assert main(["info", "--sae", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert ", block 2 (fastfg)" in shown
    assert ", block 3 (fastfg)" in shown
    assert "threshold (>=): 0.5 to 0.5, mean 0.5" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--sae", "nowhere"], "nowhere, which does not exist"),
        (["info", "--k", "3"], "k: expected it with --sae PATH only, got it without"),
        (["convert-sae", "nowhere", "out"], "nowhere, which does not exist"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_missing_is_named(tmp_path, capsys):
    save_saev(tmp_path, HEADER, weights())
    assert main(["info", "--sae", str(tmp_path)]) == 1
    assert "site: expected it to be given" in capsys.readouterr().err
