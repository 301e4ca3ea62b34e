"""The training images that could not be read are found in what was made of the others, with their reason."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastfg.study import cache_tokens, head
from fastfg.study.config import read_config
from fastfg.study.contents import _about_images
from fastfg.study.head import without_features
from fastfg.study.unread import READABLE_NOW, unread_images
from tests.study.studies import TOML
from tests.tools import tiny_vit

KEYS = list("abcde")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A configuration and five training images. The head had no features of b and c, the SAEs no tokens of c and e."""
    monkeypatch.setattr(head, "PART", 3)
    for key in "abde":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{key}.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    images = pd.DataFrame({"key": KEYS, "path": [str(tmp_path / f"{key}.png") for key in KEYS]})
    start, end = TOML.index("[saes.folders]"), TOML.index("[protocol]")
    (tmp_path / "study.toml").write_text(TOML[:start] + "[saes.train]\n" + TOML[end:])
    (tmp_path / "out/model").mkdir(parents=True)
    for first, rows in ((0, [0]), (2, [1, 2])):  # a; d and e
        file = tmp_path / f"out/model/features-training-{first:06d}.safetensors"
        save_file({"features": torch.zeros(len(rows), 1), "rows": torch.tensor(rows)}, file)
    return read_config(tmp_path / "study.toml"), images


def tokens(folder, keys):
    cache_tokens(tiny_vit(torch.float32), [(torch.zeros(len(keys), 3, 32, 48), keys)], 1, folder)
    (folder / "complete").touch()


def test_what_was_not_read_is_found(study, tmp_path):
    config, images = study
    assert without_features(config, images) == ["b", "c"]
    tokens(tmp_path / "out/tokens/1", list("abd"))
    found = {f.key: f for f in unread_images(config, images, images, lambda image: torch.zeros(3, 8, 8))}
    assert list(found) == ["b", "c", "e"]
    assert found["b"].error == found["e"].error == READABLE_NOW
    assert "cannot be read" in found["c"].error or "identify" in found["c"].error
    assert found["c"].path == str(tmp_path / "c.png")
    few = unread_images(config, images, images[:2], lambda image: torch.zeros(3, 8, 8))  # the SAEs' images
    assert [failure.key for failure in few] == ["b", "c"]


def test_the_report_says_it():
    images = pd.DataFrame({"label": ["x", "y", "", "x"]}, index=list("pqrs"))
    parts = SimpleNamespace(images=images, validation=["p"], test=list("qrs"), training=KEYS, unread=["b", "c"])
    parts.labels = ("x", "z")
    store = SimpleNamespace(failures=lambda: SimpleNamespace(to_pandas=lambda: pd.DataFrame({"key": ["b", "c"]})))
    assert _about_images(SimpleNamespace(parts=parts, store=store)) == [
        "2 of 5 training images could not be read and were not trained on (see Errors).",
        "1 of 3 test images have labels that are no classes of the model: 'y'.",
    ]
