"""The linear head of a study: its features come in parts, and unreadable images are counted over all parts."""

from hashlib import sha256
from pathlib import Path

import pytest
import torch

from fastfg.data.manifest import read_manifest, write_manifest
from fastfg.models.saved import WEIGHTS
from fastfg.study import head
from fastfg.study.backbone import load_backbone
from fastfg.study.config import read_config
from fastfg.study.head import head_classes, make_head
from fastfg.study.prepared import Once
from tests.study.studies import TOML, make_study


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


def spoil(folder, n):
    """Make ``n`` training images unreadable, and the manifest one of these files."""
    table = read_manifest(folder / "m.parquet")
    for i in table.index[table["split"] == "train"][:n]:
        content = b"no image" + bytes([i])
        Path(table.loc[i, "path"]).write_bytes(content)
        table.loc[i, "sha256"] = sha256(content).hexdigest()
        table.loc[i, "key"] = table.loc[i, "sha256"][:16]
    write_manifest(table, folder / "m.parquet")
    return int((table["split"] == "train").sum())


def allow(file, share):
    file.write_text(TOML.replace("[model]", f"max_failures = {share}\n[model]"))


def test_unreadable_images_are_counted_over_all_parts(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    n = spoil(tmp_path, 3)
    allow(file, 3 / n)
    _, _, _, said = fitted(file, tmp_path / "allowed", part=4, monkeypatch=monkeypatch)
    assert sum("Not read" in line for line in said) == 3
    allow(file, 2 / n)
    for _ in range(2):  # the parts with such images are tried again
        with pytest.raises(ValueError, match=r"max_failures: expected at most .* of .* unreadable, got 3: .*\.png"):
            fitted(file, tmp_path / "refused", part=4, monkeypatch=monkeypatch)


def test_damaged_features_are_computed_again(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    whole, *_ = fitted(file, tmp_path / "out", part=4, monkeypatch=monkeypatch)
    (tmp_path / "out/model/accuracy.json").unlink()
    one, other, *_ = sorted((tmp_path / "out/model").glob("features-*"))
    one.write_bytes(one.read_bytes()[:50])
    other.write_bytes(b"")
    again, *_ = fitted(file, tmp_path / "out", part=4, monkeypatch=monkeypatch)
    assert again == whole


def test_training_images_are_those_of_the_manifest(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    table = read_manifest(tmp_path / "m.parquet")
    train, shown = (list(table.loc[table["split"] == split, "path"]) for split in ("train", "validation"))
    Path(train[0]).write_bytes(Path(shown[0]).read_bytes())
    with pytest.raises(ValueError, match="^sha256: expected the content that the manifest was made of"):
        fitted(file, tmp_path / "out", monkeypatch=monkeypatch)


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
