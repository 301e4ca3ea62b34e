"""The examples in docs/controls.md run as written, on a small random model."""

from pathlib import Path

import torch

from fastfg.types import METHODS
from tests.docs.blocks import run_blocks

PAGE = Path(__file__).parents[2] / "docs" / "controls.md"


def test_the_page():
    torch.manual_seed(0)
    small = "img_size=64, embed_dim=48, depth=6"
    page = run_blocks(
        PAGE, replace=[("pretrained=True", small), ("224, 224)", "64, 64)"), ('"steps": 20', '"steps": 2')]
    )
    table = page["table"]
    permuted = [f"permuted {seed}" for seed in range(3)]
    assert list(table["variant"][:14]) == ["vanilla", "gated", "blurred", *permuted, *METHODS]
    assert table["error"].isna().all()
    assert len(table) == 4 * 14
    assert page["result"].methods["mine"].shape == (4, 4, 4)
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in METHODS)
