"""The linear head of a study: its features come in parts, and unreadable images are counted over all parts."""

from pathlib import Path

import pytest
import torch

from fastfg.data.manifest import read_manifest
from fastfg.models.saved import WEIGHTS
from fastfg.study import head
from fastfg.study.backbone import load_backbone
from fastfg.study.config import read_config
from fastfg.study.head import head_classes, make_head
from fastfg.study.prepared import Once
from tests.study.studies import make_study


def fitted(file, out, part=128, monkeypatch=None):
    config = read_config(file)
    config = config.model_copy(update={"run": config.run.model_copy(update={"out": out})})
    table = read_manifest(config.data.manifest)
    train, shown = (table[table["split"] == split] for split in ("train", "validation"))
    said = []
    monkeypatch.setattr(head, "PART", part)
    reached = make_head(
        config, torch.device("cpu"), train, shown, Once(out, said.append), said.append, lambda _: lambda *_: None
    )
    return reached, load_backbone("vit_tiny_patch16_224", out / "model" / WEIGHTS)[0], train, said


def test_parts_give_the_same_head(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    whole, model, train, _ = fitted(file, tmp_path / "whole", monkeypatch=monkeypatch)
    parts, other, _, _ = fitted(file, tmp_path / "parts", part=4, monkeypatch=monkeypatch)
    names = [path.name for path in sorted((tmp_path / "parts/model").glob("features-training-*"))]
    assert len(names) == -(-len(train) // 4)
    assert parts == whole
    torch.testing.assert_close(other.head.weight, model.head.weight, rtol=1e-3, atol=1e-5)
    assert model.head.weight.abs().max() > 0


def test_unreadable_images_are_counted_over_all_parts(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    train = read_manifest(tmp_path / "m.parquet").query("split == 'train'")
    for path in train["path"][:3]:  # of 4 in the first part, and 3 of all are allowed
        Path(path).write_bytes(b"no image")
    file.write_text(file.read_text().replace("[model]", f"max_failures = {3 / len(train)}\n[model]"))
    _, _, _, said = fitted(file, tmp_path / "allowed", part=4, monkeypatch=monkeypatch)
    assert sum("Not read" in line for line in said) == 3
    file.write_text(file.read_text().replace(f"max_failures = {3 / len(train)}", f"max_failures = {2 / len(train)}"))
    with pytest.raises(ValueError, match="max_failures: expected at most .* of .* unreadable, got 3"):
        fitted(file, tmp_path / "refused", part=4, monkeypatch=monkeypatch)


def test_no_training_images(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    config = read_config(file)
    table = read_manifest(config.data.manifest)
    none, shown = table[table["split"] == "none"], table[table["split"] == "validation"]
    with pytest.raises(ValueError, match="^data.manifest: expected images of the split 'train'"):
        make_head(config, torch.device("cpu"), none, shown, Once(tmp_path, print), print, lambda _: lambda *_: None)


def test_labels_that_the_head_lacks(tmp_path):
    config = read_config(make_study(tmp_path))
    table = read_manifest(config.data.manifest)
    train, shown = (table[table["split"] == split] for split in ("train", "validation"))
    assert head_classes(config, train, shown) == ("bright", "dark")
    with pytest.raises(ValueError, match=r"labels of all validation images among the classes, got \['dark'\] beside"):
        head_classes(config, train.replace({"label": {"dark": "black"}}), shown)
    named = config.model_copy(update={"model": config.model.model_copy(update={"classes": ["dark", "grey"]})})
    with pytest.raises(ValueError, match=r"labels of all training images among the classes, got \['bright'\] beside"):
        head_classes(named, train, shown)
    one = train[train["label"] == "dark"]
    with pytest.raises(
        ValueError, match=r"^model\.classes: expected at least 2 classes, got \('dark',\), the labels of"
    ):
        head_classes(config, one, one)
