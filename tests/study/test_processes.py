"""Which process this is, by the environment."""

import pytest

from fastfg.cli import main
from fastfg.study.processes import place

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (1, 0, 0)),
        ({"WORLD_SIZE": "1"}, (1, 0, 0)),
        ({"RANK": "0"}, (1, 0, 0)),
        ({"WORLD_SIZE": "", "RANK": ""}, (1, 0, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, (4, 3, 1)),
    ],
)
def test_the_place_of_a_process(given, found, monkeypatch):
    environment(given, monkeypatch)
    assert place() == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK: expected this process's number, 0 to 1, as WORLD_SIZE is 2, got none"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected 0 to 1, as WORLD_SIZE is 2, got 2"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK: expected 0 to 0, as WORLD_SIZE is 1, got 1"),
        ({"RANK": "1"}, "WORLD_SIZE: expected the number of processes, as RANK is 1, got none"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE: expected at least 1, got 0"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: expected an integer of at least 0 in the environment, got '-1'"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: expected an integer of at least 0 in the environment"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: expected an integer of at least 0 in the environment, got 'x'"),
    ],
)
def test_a_place_that_is_none_is_an_error_before_anything_runs(given, message, monkeypatch, tmp_path, capsys):
    environment(given, monkeypatch)
    assert main(["study", "run", str(tmp_path / "s.toml")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def environment(given, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
