"""The examples in docs/data.md run as written, on small photographs and a small random model."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import fastfg
from fastfg.study.presets import PRESETS
from tests.docs.blocks import python_blocks, run_blocks

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(24):
        file = Path("photos") / "ab"[i % 2] / f"p{i // 2}-{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)).save(file)
    torch.manual_seed(0)
    model, transform = fastfg.models.load("test_vit", pretrained=False, num_classes=7)
    save_file(model.state_dict(), "vit.safetensors")
    small = [
        ("vit_base_patch16_224", "test_vit"),
        ("epochs=10", "epochs=2"),
        ("reader = Reader(transform)", "import builtins; reader = Reader(builtins.page_transform)"),
    ]
    monkeypatch.setattr("builtins.page_transform", transform, raising=False)
    page = run_blocks(PAGE, replace=small)
    assert page["model"].pretrained_cfg["label_names"] == ["a", "b"]
    assert page["table"].groupby("group")["split"].nunique().max() == 1
    assert "test: balanced accuracy" in capsys.readouterr().out
    assert page["batch"].images.shape[1:] == (3, 160, 160)


def test_the_page_names_every_preset_with_its_gate():
    text = PAGE.read_text(encoding="utf-8")
    for name, study in PRESETS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |") and study.chosen_by in line]
        gate = f"{', '.join(map(str, study.layers))}; {study.kappa}; {study.c_max:g}"
        assert gate in row
    assert len(python_blocks(PAGE)) == 4
