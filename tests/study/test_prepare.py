"""What a study loads and makes before its first score."""

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from fastfg.cli import main
from fastfg.data.manifest import read_manifest, write_manifest
from fastfg.models.timm import import_timm
from fastfg.study import prepare as module
from fastfg.study.config import read_config
from fastfg.study.prepare import check_paths, check_training, load_classifier, prepare
from tests.study.studies import TOML, make_study

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def file(tmp_path):
    """A study of a model with its own head, for images of 64 x 64."""
    model = import_timm().create_model(NAME, img_size=64, num_classes=2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    file = tmp_path / "study.toml"
    file.write_text(TOML.replace("probe = true", 'classes = ["bright", "dark"]'))
    return file


def test_the_image_size_of_weights_with_a_head(file):
    model, _, classes = load_classifier(read_config(file))
    assert model.patch_embed.img_size == (64, 64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    assert classes == ("bright", "dark")


def test_an_image_size_that_the_weights_are_not_for(file):
    file.write_text(file.read_text().replace("img_size = 64", "img_size = 96"))
    shapes = r"other shapes for pos_embed \(\[1, 17, 192\] and not \[1, {}, 192\]\); position embeddings depend on the "
    with pytest.raises(ValueError, match=shapes.format(37) + r"image size \(with model\.img_size = 96\)$"):
        load_classifier(read_config(file))
    file.write_text(file.read_text().replace("img_size = 96\n", ""))
    with pytest.raises(ValueError, match=shapes.format(197) + r"image size \(set model\.img_size to the side"):
        load_classifier(read_config(file))


@pytest.mark.parametrize(
    ("old", "new"),
    [("probe = true", 'preset = "covid-qu-ex"'), (f'name = "{NAME}"\n', 'name = "open_clip:ViT-B-32"\n')],
)
def test_no_image_size_where_it_is_fixed(file, old, new):
    file.write_text(TOML.replace(old, new).replace("probe = true", ""))
    with pytest.raises(ValueError, match=r"model\.img_size: expected none .*, got 64"):
        read_config(file)


def test_training_images_to_hold_out(file):
    start, end = TOML.index("[saes.folders]"), TOML.index("[protocol]")
    file.write_text(TOML[:start] + "[saes.train]\n" + TOML[end:])
    config = read_config(file)
    train = pd.DataFrame({"key": list("abcdefgh"), "group": "", "split": "train"})
    check_training(config, train)
    check_training(config, train[:6])
    with pytest.raises(ValueError, match=r"^saes\.train: expected at least 6 training images, .*, got 5$"):
        check_training(config, train[:5])
    with pytest.raises(ValueError, match=r"^saes\.train: expected at least 6 groups of training images, .*, got 4$"):
        check_training(config, train.assign(group=list("ppqqrrss")))
    one_without = train.assign(group=[*"ppqqrrs", ""])  # it is a group by itself
    with pytest.raises(ValueError, match=r"^saes\.train: expected at least 6 groups of training images, .*, got 5$"):
        check_training(config, one_without)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("k = 193", r"^saes\.train\.k: expected .*, got 193$"),
        ("batch_tokens = 4096", r"^saes\.train\.batch_tokens: expected at most 144, the tokens to train on, got 4096$"),
        ("tokens_per_image = 17", r"^saes\.train\.tokens_per_image: expected at most 16, the patches per .*, got 17$"),
    ],
)
def test_settings_that_do_not_fit_are_said_before_tokens_are_written(tmp_path, setting, message):
    start, end = TOML.index("[saes.folders]"), TOML.index("[protocol]")
    train = {"expansion": "expansion = 1", "k": "k = 8", "batch_tokens": "batch_tokens = 64"}
    train[setting.split(" ")[0]] = setting
    file = make_study(tmp_path)
    file.write_text(TOML[:start] + "\n".join(["[saes.train]", *train.values()]) + "\n" + TOML[end:])
    with pytest.raises(ValueError, match=message):
        prepare(read_config(file), torch.device("cpu"), lambda text: None, lambda title: lambda *at: None)
    assert not (tmp_path / "out/tokens").exists()


def test_labels_are_checked_before_anything_is_trained(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    text = file.read_text().replace("probe = true", 'probe = true\ntarget = "label"')
    file.write_text(text)
    table = read_manifest(tmp_path / "m.parquet")
    table.loc[table.index[table["split"] == "test"][0], "label"] = "grey"
    write_manifest(table, tmp_path / "m.parquet")

    def train(*_):
        raise AssertionError

    monkeypatch.setattr(module, "make_head", train)
    monkeypatch.setattr(module, "_train", train)
    for probe in (True, False):
        monkeypatch.setattr(module, "load_classifier", lambda _: (None, None, ("bright", "dark")))
        file.write_text(text if probe else text.replace("probe = true", ""))
        with pytest.raises(ValueError, match=r"^model\.classes: expected the labels of the .* none for \['grey'\]"):
            prepare(read_config(file), torch.device("cpu"), print, lambda _: print)


def test_missing_folders_of_saes_are_said_before_anything_is_made(tmp_path):
    file = make_study(tmp_path)
    file.write_text(TOML.replace("saes/trained", "saes/nope"))
    with pytest.raises(
        FileNotFoundError, match=r"saes\.folders\.trained: expected SAEs, got .*nope, which does not exist"
    ):
        prepare(read_config(file), torch.device("cpu"), lambda text: None, lambda title: lambda *at: None)
    assert not (tmp_path / "out").exists()


def test_folders_without_saes_are_said_before_anything_is_made(tmp_path, capsys):
    file = make_study(tmp_path)
    (tmp_path / "saes/random/layer_2").rename(tmp_path / "layer_2")
    said = f"saes.folders.random: layers: expected blocks among [1] of {tmp_path}/saes/random, got [2]"
    for more in ([], ["--dry-run"]):
        assert main(["study", "run", str(file), "--processes", "1", *more]) == 1
        assert said in capsys.readouterr().err
    (tmp_path / "saes/random/layer_1").rename(tmp_path / "layer_1")
    with pytest.raises(ValueError, match=r"^saes\.folders\.random: expected SAE folders named by block under"):
        prepare(read_config(file), torch.device("cpu"), print, lambda _: print)
    file.write_text(TOML.replace("shuffled = 2", "shuffled = 2\ncontrols = []"))
    check_paths(read_config(file))  # no control needs it
    assert not (tmp_path / "out").exists()


def test_saes_that_cannot_be_read_are_said_before_anything_is_made(tmp_path):
    file = make_study(tmp_path)
    weights = tmp_path / "saes/frozen/layer_1/sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^saes\.folders\.frozen-decoder: .*layer_1"):
        prepare(read_config(file), torch.device("cpu"), print, lambda _: print)
    assert not (tmp_path / "out").exists()


def test_a_class_that_is_not_trained_on_is_said(tmp_path, monkeypatch):
    file = make_study(tmp_path)
    table = read_manifest(tmp_path / "m.parquet")
    table.loc[table.index[table["split"] == "test"][:2], "label"] = "grey"
    write_manifest(table, tmp_path / "m.parquet")
    said = []
    expected = "Without a class that the model has learned: grey (2 images). The scores of these images are in all"

    def made(*_):
        assert any(line.startswith(expected) for line in said)
        raise InterruptedError

    monkeypatch.setattr(module, "make_head", made)
    with pytest.raises(InterruptedError):
        prepare(read_config(file), torch.device("cpu"), said.append, lambda _: print)


@pytest.mark.parametrize(("classes", "n"), [(("bright", "dark"), 1), (("hell", "dunkel"), 0)])
def test_a_class_that_the_weights_do_not_have_is_said(file, monkeypatch, classes, n):
    make_study(file.parent)
    file.write_text(TOML.replace("probe = true", f'classes = ["{classes[0]}", "{classes[1]}"]'))
    model = import_timm().create_model(NAME, img_size=64, num_classes=2)
    save_file(model.state_dict(), file.parent / "w.safetensors")
    table = read_manifest(file.parent / "m.parquet")
    table.loc[table.index[table["split"] == "test"][0], "label"] = "grey"
    write_manifest(table, file.parent / "m.parquet")
    said = []
    parts = prepare(read_config(file), torch.device("cpu"), said.append, lambda _: print)
    assert sum("grey (1 image)" in line for line in [*said, parts.unlearned]) == 2 * n
