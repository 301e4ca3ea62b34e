"""The examples in CONTRIBUTING.md run as written, one after another."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastfg.sae.files import open_weights
from fastfg.sae.formats.common import Config, Contents, Given
from tests.docs.blocks import run_blocks

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def namespace():
    torch.manual_seed(0)
    return run_blocks(PAGE)


def test_a_model_of_your_own_is_explained_and_judged(namespace):
    assert namespace["result"].maps.shape == (2, 4, 6)
    assert len(set(namespace["result"].maps.flatten().tolist())) == 48
    for name in ("saco", "faithfulness_correlation", "pixel_flipping"):
        assert namespace["scores"][name].isfinite().all()
    assert namespace["scores"].errors == []


def test_an_sae_format_of_your_own_is_read(namespace, tmp_path):
    d, F = 8, 20
    weights = {"encoder.weight": (F, d), "encoder.bias": (F,), "decoder.weight": (d, F), "decoder.bias": (d,)}
    state = {name: torch.randn(shape) for name, shape in weights.items()}
    save_file(state, tmp_path / "my_sae.safetensors")
    found = open_weights(tmp_path / "my_sae.safetensors")
    assert not namespace["matches"](Contents(found, {}))
    config = Config({"format": "my format", "k": 3}, tmp_path / "config.json")
    contents = Contents(found, {"config.json": config})
    assert namespace["matches"](contents)
    with pytest.raises(ValueError, match="site: expected it to be given"):
        namespace["read"](contents, Given({}, contents.file))
    sae, x = namespace["read"](contents, Given({"site": "resid_post"}, contents.file)), torch.randn(5, d)
    before = (x - state["decoder.bias"]) @ state["encoder.weight"].T + state["encoder.bias"]
    best = before.topk(3)
    torch.testing.assert_close(sae.encode(x), torch.zeros(5, F).scatter(1, best.indices, best.values.relu()))
