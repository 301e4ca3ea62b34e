"""How a study runs: what it writes about itself, and when."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from fastfg.report import page
from fastfg.study import run
from fastfg.study.config import read_config
from fastfg.study.run import device_of, run_study
from tests.study.studies import TOML


def silent(*_):
    pass


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there(tmp_path, name):
    file = tmp_path / "study.toml"
    file.write_text(f'{TOML}device = "{name}"\n')
    with pytest.raises(ValueError, match=rf"^run\.device: expected one that torch can use here, got '{name}': \w"):
        device_of(read_config(file))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs ``TOML`` with a title, in one folder; models, scores and the report are stand-ins."""
    model, claim = torch.nn.Linear(2, 2), SimpleNamespace(sentence="", conditions=[])
    images = pd.DataFrame({"split": []})
    parts = SimpleNamespace(model=SimpleNamespace(model=model), images=images, training=[], unread=[])
    parts.transform = lambda image: torch.zeros(3, 4, 4)
    monkeypatch.setattr(run, "prepare", lambda *_: parts)
    monkeypatch.setattr(run, "run_protocol", silent)
    monkeypatch.setattr(run, "contents", silent)
    monkeypatch.setattr(run, "with_evidence", lambda *_: SimpleNamespace(claims=[claim]))
    monkeypatch.setattr(page, "write_report", lambda out, _: out)

    def ran(title, old="[run]", new="[run]", write=True):
        file = tmp_path / "study.toml"
        file.write_text(TOML.replace('"Tiny"', f'"{title}"').replace(old, new))
        (tmp_path / "out").mkdir(exist_ok=True)
        return run_study(read_config(file), silent, lambda _: silent, write=write)

    return ran


def test_the_configuration_is_that_of_the_results(study, tmp_path, monkeypatch):
    written = tmp_path / "out/config.json"
    study("helper", write=False)
    assert not written.exists()
    study("first")
    assert json.loads(written.read_text())["title"] == "first"
    shards = tmp_path / "out/scores/shards"
    shards.mkdir(parents=True)
    (shards / "recipe.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match="other settings need another folder"):
        study("refused by the scores")
    (shards / "recipe.json").unlink()

    def refuse(*_):
        raise ValueError("refused")

    monkeypatch.setattr(run, "run_protocol", refuse)
    with pytest.raises(ValueError, match="refused"):
        study("refused by the protocol")
    assert json.loads(written.read_text())["title"] == "first"
