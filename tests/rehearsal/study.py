"""A small study on the card, from its linear head to its report; see test_rehearsal.py."""

from fastfg.study import prepare
from fastfg.study.config import read_config
from fastfg.study.run import run_study
from tests.study.studies import TOML, make_study

SMALL = {  # the interpreter is slow
    "layers = [1, 2]": "layers = [1]",
    "kappa = [0.5, 1.0]": 'kappa = [0.5]\nscores = ["combined"]',
    "steps = 3": 'steps = 2\ncontrols = ["random-sae", "centre"]',
    "shuffled = 2": "shuffled = 1",
}


def test_a_study(tmp_path, monkeypatch):
    file = make_study(tmp_path, n=10)
    text = TOML
    for name, small in SMALL.items():
        assert name in text
        text = text.replace(name, small)
    file.write_text(text)
    devices, features_of = set(), prepare.features_of

    def watched(model, images):
        devices.add(images.device.type)
        return features_of(model, images)

    monkeypatch.setattr(prepare, "features_of", watched)
    page = run_study(read_config(file), lambda line: None, lambda title: lambda *_: None)
    assert devices == {"cuda"}
    assert "<h1>Tiny" in page.read_text(encoding="utf-8")
