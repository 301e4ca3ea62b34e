"""The presets: the paper's choices, models from the user's files, and messages that say what is missing."""

import dataclasses

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastfg
from fastfg.models import ZeroShot
from fastfg.study.presets import PRESETS, preset
from fastfg.study.zero_shot import import_open_clip, load_zero_shot

PAPER = {
    "covid-qu-ex": ((2, 3, 4), 1.0, 50.0),
    "hyperkvasir": ((4, 6, 7), 0.1, 50.0),
    "imagenet": ((6, 9, 10), 0.5, 10.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_gates(name):
    chosen = preset(name)
    assert (chosen.gate.layers, chosen.gate.kappa, chosen.gate.c_max) == PAPER[name]
    assert chosen.chosen_by == "paper"
    assert max(chosen.layers) < chosen.blocks


def test_class_names():
    assert len(preset("covid-qu-ex").label_names()) == 3
    assert len(preset("hyperkvasir").label_names()) == 6
    imagenet = preset("imagenet")
    assert imagenet.label_names()[:2] == ("n01440764", "n01443537")
    assert imagenet.class_names()[:2] == ("tench", "goldfish")
    assert len(imagenet.label_names()) == len(imagenet.class_names()) == 1000
    for chosen in PRESETS.values():
        assert list(chosen.label_names()) == sorted(chosen.label_names())  # the order that a folder of classes gives


@pytest.mark.parametrize("name", PRESETS)
def test_missing_weights_say_what_is_expected_and_how_to_get_it(name, tmp_path):
    for file in (None, tmp_path / "nothing.pt"):
        with pytest.raises(FileNotFoundError, match="weights: expected .*, got .*. To get it: ") as error:
            preset(name).load(file)
        assert preset(name).weights in str(error.value)
        assert preset(name).get_weights in str(error.value)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of covid-qu-ex, .*, got 'mnist'"):
        preset("mnist")


def test_a_timm_preset_loads_its_weights(tmp_path):
    small = dataclasses.replace(preset("covid-qu-ex"), model="vit_tiny_patch16_224")
    model, _ = fastfg.models.load("vit_tiny_patch16_224", pretrained=False, num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded, transform = small.load(tmp_path / "w.safetensors")
    images = transform(Image.new("L", (300, 200), 90))[None]
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="weights: expected 6 classes in .*, got 3"):
        dataclasses.replace(preset("hyperkvasir"), model=small.model).load(tmp_path / "w.safetensors")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP with random weights, and its file."""
    open_clip = import_open_clip()
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt", load_weights=False).eval()
    file = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    return model, file


def test_zero_shot_is_what_open_clip_computes(clip):
    model, file = clip
    open_clip = import_open_clip()
    names, templates = ("a {brace}", "dog", "lung"), ("a photo of a {}.", "a blurry {}.")
    classifier, transform = load_zero_shot("ViT-S-32-alt", file, names, templates)
    images = transform(Image.linear_gradient("L").resize((300, 260)))[None]
    assert images.shape == (1, 3, 224, 224)
    tokens = open_clip.get_tokenizer("ViT-S-32-alt")
    with torch.no_grad():
        text = [
            model.encode_text(tokens([t.replace("{}", name) for t in templates]), normalize=True).mean(0)
            for name in names
        ]
        text = torch.nn.functional.normalize(torch.stack(text), dim=-1)
        expected = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text.T
        torch.testing.assert_close(classifier(images), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(classifier, ZeroShot)
    assert fastfg.attribute(classifier, images).maps.shape == (1, 7, 7)


def test_zero_shot_arguments(clip, tmp_path):
    _, file = clip
    with pytest.raises(ValueError, match="model: expected the name of an open_clip model, got 'ViT-Z'"):
        load_zero_shot("ViT-Z", file, ("a", "b"), ("{}",))
    for templates, got in (((), "none"), (("a photo",), r"\['a photo'\]")):
        with pytest.raises(ValueError, match=f"templates: expected texts with {{}} for the class, got {got}"):
            load_zero_shot("ViT-S-32-alt", file, ("a", "b"), templates)
    for names in ((), ("a",), ("a", " "), "ab"):
        with pytest.raises(ValueError, match="class_names: expected at least 2 names, none of them empty, got"):
            load_zero_shot("ViT-S-32-alt", file, names, ("{}",))
    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="weights: expected those of ViT-S-32-alt, got a state dict with no "):
        load_zero_shot("ViT-S-32-alt", tmp_path / "other.safetensors", ("a", "b"), ("{}",))
