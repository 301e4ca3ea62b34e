"""A saved classifier is the same model when fastfg reads it, and when timm does."""

import json

import pytest
import timm
import torch
from PIL import Image

import fastfg
from fastfg.models.saved import save_classifier, saved_config
from fastfg.study.backbone import load_backbone, trained_labels

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def saved(tmp_path):
    model, _ = fastfg.models.load(NAME, pretrained=False, num_classes=3, img_size=32)
    return model, save_classifier(tmp_path / "out", model, NAME, ("a", "b", "NA"), model_args={"img_size": 32})


def test_fastfg_reads_it(saved):
    model, file = saved
    read, transform = fastfg.models.load(NAME, file)
    assert trained_labels(read) == ("a", "b", "NA")
    images = transform(Image.linear_gradient("L"))[None]
    assert images.shape == (1, 3, 32, 32)
    torch.testing.assert_close(read(images), model(images), rtol=0, atol=0)
    assert trained_labels(model) is None
    assert load_backbone(NAME, file)[0].num_classes == 3


def test_timm_reads_it(saved):
    model, file = saved
    read = timm.create_model(f"local-dir:{file.parent}", pretrained=True).eval()
    assert tuple(read.pretrained_cfg["label_names"]) == ("a", "b", "NA")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(read(images), model(images), rtol=0, atol=0)


def test_another_architecture_is_refused(saved):
    with pytest.raises(ValueError, match=f"model: expected {NAME}, as .*weights.safetensors says, got vit_small"):
        fastfg.models.load("vit_small_patch16_224", saved[1])


def test_labels_are_as_many_as_outputs(saved, tmp_path):
    with pytest.raises(ValueError, match="labels: expected 3 names, as the model has outputs, got 2"):
        save_classifier(tmp_path, saved[0], NAME, ("a", "b"))


def test_other_config_files_are_left_alone(saved):
    _, file = saved
    assert saved_config(file.with_name("other.safetensors")) is None
    for text in ("{", "[]", json.dumps({"architectures": ["ViT"]})):
        (file.parent / "config.json").write_text(text)
        assert saved_config(file) is None
    (file.parent / "config.json").write_text(json.dumps({"fastfg": {"weights": file.name}}))
    with pytest.raises(ValueError, match="weights: expected architecture, label_names, .* in .*config.json, got none"):
        saved_config(file)
