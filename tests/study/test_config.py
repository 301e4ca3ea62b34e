"""The file of a study: what it may hold, what is said of a wrong one, and the files that ``init`` writes."""

import sys

import pytest

from fastfg.data.manifest import write_manifest
from fastfg.data.splits import from_folder
from fastfg.study.config import read_config
from fastfg.study.init import init
from tests.study.studies import TOML, photographs

pytest.importorskip("pydantic")


def write(tmp_path, text):
    file = tmp_path / "s.toml"
    file.write_text(text)
    return file


def test_paths_start_at_the_file(tmp_path):
    config = read_config(write(tmp_path, TOML))
    assert config.data.manifest == tmp_path / "m.parquet"
    assert config.run.out == tmp_path / "out"
    assert config.model.weights == tmp_path / "w.safetensors"
    assert config.saes.folders["trained"] == tmp_path / "saes/trained"
    assert config.test.modes == ["mean", "removed"]
    assert config.kinds == ("trained", "frozen-decoder", "random")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[protocol]", "[protocl]", r"protocl: expected one of the keys .*got 'protocl' \(did you mean protocol\?\)"),
        ("layers = ", "layer = ", r"protocol\.layer: expected one of .* \(did you mean layers\?\)"),
        ("layers = [1, 2]", "layers = []", r"protocol\.layers: expected distinct 0-based blocks, .*got \[\]"),
        ("layers = [1, 2]", "layers = [1, 1]", r"protocol\.layers: expected distinct .*got \[1, 1\]"),
        ("kappa = [0.5, 1.0]", "kappa = [0.0]", r"protocol\.kappa\.0: expected greater than 0, got 0\.0"),
        ("c_max = [10.0]", "c_max = [1]", r"protocol\.c_max\.0: expected greater than 1, got 1"),
        ("layers = [1, 2]", "layers = [1, 2]\ncombinations = [[3]]", r"combinations: expected distinct blocks among"),
        ("shuffled = 2", 'shuffled = 2\nmodes = ["men"]', r"test\.modes: .*got 'men' \(did you mean mean\?\)"),
        ("shuffled = 2", 'shuffled = 2\nmetrics = ["srg"]', r"test\.metrics: expected others than srg"),
        ("shuffled = 2", 'shuffled = 2\nmetrics = ["saoc"]', r"test\.metrics: .*got 'saoc' \(did you mean saco\?\)"),
        ("shuffled = 2", "shuffled = -1", r"test\.shuffled: expected greater than or equal to 0, got -1"),
        ('title = "Tiny"', "", r"title: expected a value, got none"),
        ('random = "saes/random"', "", r"saes\.folders: expected a folder for random"),
        ('random = "saes/random"', 'rndom = "saes/random"', r"folders.*expected kinds among .*got 'rndom'"),
        ('title = "Tiny"', "title = ", r"expected a TOML file, got"),
        (
            "probe = true",
            'probe = true\nclasses = ["a", "b", "a"]',
            r"model\.classes: expected different names, .*'a'\]",
        ),
        (
            "probe = true",
            'probe = true\nclasses = ["a", " "]',
            r"model\.classes: .*none of them empty, got \['a', ' '\]",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, TOML.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"model\.classes: expected at least 2 names, none of them empty, got \[\]$"),
        ('classes = ["good"]', r"model\.classes: expected at least 2 names, .* got \['good'\]$"),
        (
            'classes = ["good", "bad", "good"]',
            r"model\.classes: expected different names, .* got \['good', 'bad', 'good'\]",
        ),
        ('classes = ["good cell", "Good  cell"]', r"model\.classes: expected different names, .* got"),
        (
            'classes = ["good", ""]',
            r"model\.classes: expected at least 2 names, none of them empty, got \['good', ''\]",
        ),
        (
            'classes = ["good", "bad"]\ntemplates = ["a cell"]',
            r"model\.templates: expected texts with {} .*\['a cell'\]",
        ),
        (
            'classes = ["good", "bad"]\ntemplates = []',
            r"model\.templates: expected texts with {} for the class, got none",
        ),
    ],
)
def test_the_prompts_of_a_zero_shot_classifier(tmp_path, text, message):
    start = TOML.replace('name = "vit_tiny_patch16_224"\nimg_size = 64\n', 'name = "open_clip:ViT-B-32"\n')
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, start.replace("probe = true", text)))
    good = 'classes = ["good", "bad"]'
    assert read_config(write(tmp_path, start.replace("probe = true", good))).model.zero_shot


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="config: expected a TOML file"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "photos").mkdir()
    with pytest.raises(IsADirectoryError, match="got .*photos, which is a folder$"):
        read_config(tmp_path / "photos")
    (tmp_path / "photos.toml").touch()
    with pytest.raises(IsADirectoryError, match=r"which is a folder \(did you mean .*photos\.toml\?\)$"):
        read_config(tmp_path / "photos")


def test_folders_or_training(tmp_path):
    with pytest.raises(ValueError, match=r"saes: expected folders, or \[saes.train\], got both"):
        read_config(write(tmp_path, TOML + "[saes.train]\nk = 3\n"))


@pytest.mark.parametrize("full", [False, True])
def test_init_writes_a_file_that_can_be_read(tmp_path, full):
    photographs(tmp_path / "photos", 30)
    said = []
    file = init(str(tmp_path / "photos"), tmp_path / "a.toml", model="vit_tiny_patch16_224", full=full, say=said.append)
    config = read_config(file)
    assert config.model.classes == ["bright", "dark"]
    assert config.data.manifest == tmp_path / "a-manifest.parquet"
    assert config.test.steps == (32 if full else 2)
    assert config.test.shuffled == 19
    assert any("dark" in line and "train" in line for line in said)
    assert len(from_folder(tmp_path / "photos").table) == 30


def test_init_refuses(tmp_path):
    (tmp_path / "there.toml").touch()
    with pytest.raises(ValueError, match="expected a new file"):
        init("elpv", tmp_path / "there.toml")
    with pytest.raises(ValueError, match=r"STUDY: .*got 'elvp' \(did you mean elpv\?\)"):
        init("elvp", tmp_path / "x.toml")
    with pytest.raises(ValueError, match=r"manifest: expected --manifest FILE for imagenet"):
        init("imagenet", tmp_path / "x.toml")
    with pytest.raises(ValueError, match=r"model: expected --model NAME"):
        init(str(tmp_path), tmp_path / "x.toml")
    with pytest.raises(ValueError, match=r"model: expected none for elpv"):
        init("elpv", tmp_path / "x.toml", model="vit_tiny_patch16_224")
    assert [path.name for path in tmp_path.iterdir()] == ["there.toml"]


def test_init_refuses_images_and_models_with_which_no_study_runs(tmp_path):
    photographs(tmp_path / "photos", 30)
    said = (str(tmp_path / "photos"), tmp_path / "x.toml")
    with pytest.raises(ValueError, match=r"model: expected the name of a timm model, got 'vit_tny.*close: vit_tiny"):
        init(*said, model="vit_tny_patch16_224")
    with pytest.raises(
        ValueError, match=r"model: expected a timm VisionTransformer or Eva, got 'resnet50', .* ResNet$"
    ):
        init(*said, model="resnet50")
    with pytest.raises(ValueError, match=r"model: timm could not create .*Invalid pretrained tag \(nonsense\)"):
        init(*said, model="vit_giant_patch14_dinov2.nonsense")
    (tmp_path / "photos/dark").rename(tmp_path / "dark")
    with pytest.raises(ValueError, match=r"STUDY: expected training images of at least 2 classes, .* got \['bright'\]"):
        init(*said, model="vit_tiny_patch16_224")
    (tmp_path / "photos/dark").mkdir()
    for image in list((tmp_path / "photos/bright").iterdir())[3:]:
        image.unlink()
    for image in list((tmp_path / "dark").iterdir())[:3]:
        image.rename(tmp_path / "photos/dark" / image.name)
    with pytest.raises(
        ValueError, match=r"STUDY: expected at least 2 images each to validate and to test with, got \d+ train"
    ):
        init(*said, model="vit_tiny_patch16_224")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dark", "photos"]


def test_init_refuses_a_head_that_is_trained_on_one_class(tmp_path):
    photographs(tmp_path / "photos", 30)
    table = from_folder(tmp_path / "photos").table
    write_manifest(table[(table["split"] != "train") | (table["label"] == "dark")], tmp_path / "images.parquet")
    with pytest.raises(ValueError, match=r"STUDY: expected training images of at least 2 classes, .* got \['dark'\]"):
        init(str(tmp_path / "images.parquet"), tmp_path / "x.toml", model="vit_tiny_patch16_224")
    assert not (tmp_path / "x.toml").exists()


def test_init_checks_names_of_models_only_with_timm(tmp_path, monkeypatch):
    photographs(tmp_path / "photos", 30)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert init(str(tmp_path / "photos"), tmp_path / "x.toml", model="vit_tny_patch16_224", say=[].append).exists()


def test_init_of_few_images_writes_what_can_run(tmp_path):
    photographs(tmp_path / "photos", 30)
    said = []
    file = init(str(tmp_path / "photos"), tmp_path / "a.toml", model="vit_tiny_patch16_224", say=said.append)
    train = read_config(file).saes.train
    assert (train.images, train.tokens_per_image) == (None, None)
    assert "Before it runs, set weights in [model]: the file with those of vit_tiny_patch16_224" in said
    with pytest.raises(FileNotFoundError, match=r"weights: expected a file, got .*nofile"):
        init(str(tmp_path / "photos"), tmp_path / "b.toml", model="vit_tiny_patch16_224", weights=tmp_path / "nofile")


@pytest.mark.parametrize(
    ("model", "full", "layers"),
    [("test_vit", False, [4]), ("test_vit", True, [2, 3, 4, 5]), ("org/a", False, [4, 6, 8])],
)
def test_init_writes_blocks_that_the_model_has(tmp_path, model, full, layers):
    photographs(tmp_path / "photos", 30)
    file = init(str(tmp_path / "photos"), tmp_path / "a.toml", model=model, full=full, say=[].append)
    assert read_config(file).protocol.layers == layers


def test_init_says_which_classes_are_not_trained_on(tmp_path):
    photographs(tmp_path / "photos", 30)
    table = from_folder(tmp_path / "photos").table
    table.loc[table.index[table["split"] == "test"][0], "label"] = "grey"
    write_manifest(table, tmp_path / "images.parquet")
    said = []
    init(str(tmp_path / "images.parquet"), tmp_path / "x.toml", model="vit_tiny_patch16_224", say=said.append)
    assert said[0].startswith("Without a class that the model has learned: grey (1 image). The scores of")
