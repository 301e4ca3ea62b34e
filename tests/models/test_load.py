"""A timm model by name, with its weights and its transform."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastfg
from fastfg.models import import_timm, load

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "depth": 2}


@pytest.fixture
def state():
    torch.manual_seed(0)
    return import_timm().create_model(NAME, num_classes=4, **SMALL).state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_weights_and_transform(tmp_path, state, suffix):
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if suffix == "pth" else state, file)
    model, transform = load(NAME, file, **SMALL)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    images = torch.stack([transform(Image.new("L", (40, 50), 200))])
    assert images.shape == (1, 3, 32, 32)
    assert fastfg.attribute(model, images).logits.shape == (1, 4)


def test_other_stems_and_channels():
    model, transform = load("vit_base_mci_224", pretrained=False, img_size=32, depth=1, num_classes=4)
    images = torch.stack([transform(Image.new("RGB", (40, 50)))])
    assert fastfg.attribute(model, images).maps.shape == (1, 2, 2)
    with pytest.raises(ValueError, match="model: expected a mean for each of its 1 input channels"):
        load(NAME, pretrained=False, in_chans=1, **SMALL)
    grey = {"mean": (0.5,), "std": (0.5,), "input_size": (1, 32, 32)}
    _, transform = load(NAME, pretrained=False, in_chans=1, pretrained_cfg_overlay=grey, **SMALL)
    assert transform(Image.new("RGB", (40, 50))).shape == (1, 32, 32)


def test_wrong_arguments_are_named(tmp_path, state):
    with pytest.raises(ValueError, match="weights: expected a file, or pretrained=True or False, got neither"):
        load(NAME)
    with pytest.raises(ValueError, match="weights: expected a file, or pretrained=True or False, got both"):
        load(NAME, tmp_path, pretrained=True)
    with pytest.raises(FileNotFoundError, match="weights: expected a file, got .*nowhere.pt, which does not exist"):
        load(NAME, tmp_path / "nowhere.pt")
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"\x00" * 20)
        with pytest.raises(ValueError, match=f"weights: expected a state dict .* got .*{name}, which cannot be read"):
            load(NAME, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="weights: expected a state dict {name: tensor}, got .*list.pt"):
        load(NAME, tmp_path / "list.pt")
    save_file({"cls_token": torch.zeros(1, 1, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"weights: expected those of {NAME}, got a state dict with "):
        load(NAME, tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match="model: expected a fastfg.models.Adapter .* got timm.models.resnet.ResNet"):
        load("resnet18", pretrained=False)


def test_it_works_without_importing_timm_first():
    """README's first lines: they also run beside a torchvision that was built for another torch."""
    code = "import fastfg; fastfg.models.load('vit_tiny_patch16_224', pretrained=False, depth=1); import timm"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
