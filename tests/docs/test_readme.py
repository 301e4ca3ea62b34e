"""The README's quick start runs as written, on generated photographs and a small random model instead of a download."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import fastfg
from tests.docs.blocks import run_blocks

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_start(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    random = torch.Generator().manual_seed(0)
    for name in ("photo.jpg", *(f"photos/{n}.jpg" for n in range(4))):
        pixels = torch.randint(256, (12, 16, 3), dtype=torch.uint8, generator=random)
        Image.fromarray(pixels.numpy()).resize((320, 240)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    narrow = "pretrained=False, embed_dim=48"  # a sixteenth of the work
    page = run_blocks(ROOT / "README.md", replace=[("pretrained=True", narrow), ("n_features=2048", "n_features=128")])
    with Image.open("overlay.png") as overlay:
        assert overlay.size == (224, 224)
    assert page["scores"]["saco"].shape == (1,)
    assert page["gated"].maps.shape == page["result"].maps.shape == (1, 14, 14)
    assert not torch.equal(page["gated"].maps, page["result"].maps)
    variants = ["vanilla", "gated", "shuffled decoder", "no SAE", "random", "grad_cam"]
    assert list(page["table"]["variant"]) == variants * 4
    assert page["table"][["srg", "saco"]].notna().all(axis=None)
    assert list(fastfg.load_saes("saes/", layers=[2, 3, 4])) == [2, 3, 4]


def test_the_version_to_cite_is_the_installed_one():
    assert f"version = {{{fastfg.__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\nversion: {fastfg.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
