"""Manifests of ``fastfg data prepare`` where commands take images."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastfg.cli import main
from fastfg.data.manifest import build, read_manifest, write_manifest
from fastfg.models.saved import save_classifier
from fastfg.models.timm import import_timm

NAME = "test_vit"
SPLITS = ("train", "train", "train", "validation", "test", "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A manifest of six images, with the masks and groups of the first five, and a model with its class names."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    rows = []
    for i, split in enumerate(SPLITS):
        path, mask = folder / "images" / f"{i}.png", folder / "marks" / f"m{i}.png"
        for file, high in ((path, 255), (mask, 2)):
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, high, (160, 160), dtype=np.uint8)).save(file)
        about = {"group": f"g{i // 2 if i < 3 else i}", "mask": mask} if i < 5 else {}
        rows.append({"path": path, "label": ("cat", "dog")[i % 2], "split": split, **about})
    write_manifest(build(rows).table, folder / "m.parquet")
    write_manifest(build(rows).table, folder / "m.csv")
    torch.manual_seed(0)
    model = import_timm().create_model(NAME, num_classes=2)
    save_file(model.state_dict(), folder / "plain.safetensors")
    save_classifier(folder / "named", model, NAME, ["cat", "dog"])
    return folder


def command(files, name, out, *more, weights="named/weights.safetensors", metrics=("pixel_flipping",)):
    steps = ["--metrics", *metrics, "--patches-per-step", "49"] if name == "evaluate" else []
    return [name, "--model", NAME, "--weights", str(files / weights), "--out", str(out), *steps, *map(str, more)]


def numbers(table):
    return sorted(int(path[-5]) for path in set(table["path"]))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_images_of_a_split(files, tmp_path, capsys, suffix):
    manifest = files / f"m.{suffix}"
    assert main(command(files, "attribute", tmp_path / "a", manifest, "--split", "test")) == 0
    assert f"{manifest}: 2 images of split test" in capsys.readouterr().out.replace("\n", "")
    assert numbers(pd.read_csv(tmp_path / "a" / "attributions.csv")) == [4, 5]
    assert main(command(files, "attribute", tmp_path / "b", manifest)) == 0
    assert "6 images of all splits (train 3, validation 1, test 2)" in capsys.readouterr().out.replace("\n", "")
    assert numbers(pd.read_csv(tmp_path / "b" / "attributions.csv")) == [0, 1, 2, 3, 4, 5]


def test_another_split_needs_another_folder(files, tmp_path, capsys):
    assert main(command(files, "attribute", tmp_path / "a", files / "m.csv", "--split", "test")) == 0
    assert main(command(files, "attribute", tmp_path / "a", files / "m.csv")) == 1
    assert "split" in capsys.readouterr().err


def test_labels_are_the_targets_that_are_asked_for(files, tmp_path, capsys):
    assert main(command(files, "attribute", tmp_path / "a", files / "m.csv", "--target", "label")) == 0
    table = pd.read_csv(tmp_path / "a" / "attributions.csv")
    assert [int(path[-5]) % 2 for path in table["path"]] == list(table["target"])
    assert set(table["target"]) == {0, 1}
    assert list(table["target"]) != list(table["predicted"])  # else the test could not tell
    assert main(command(files, "evaluate", tmp_path / "b", files / "m.csv", "--target", "label")) == 0
    scores = pd.read_parquet(tmp_path / "b" / "scores.parquet")
    assert [int(path[-5]) % 2 for path in scores["path"]] == list(scores["target"])
    capsys.readouterr()
    for images, weights, message in (
        ("m.csv", "plain.safetensors", "target: expected --weights of fastfg finetune, which name the classes"),
        ("images", "named/weights.safetensors", "target: expected images of a manifest with label, got"),
    ):
        more = (files / images, "--target", "label")
        assert main(command(files, "attribute", tmp_path / "c", *more, weights=weights)) == 1
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_other_labels_are_computed_again(files, tmp_path, capsys):
    table = read_manifest(files / "m.csv")
    out, more = tmp_path / "out", (tmp_path / "m.csv", "--target", "label")
    write_manifest(table, tmp_path / "m.csv")
    assert main(command(files, "attribute", out, *more)) == 0
    before = pd.read_csv(out / "attributions.csv").set_index("path")["target"]
    table["label"] = table["label"].map({"cat": "dog", "dog": "cat"})
    write_manifest(table, tmp_path / "m.csv")
    assert main(command(files, "attribute", out, *more)) == 0
    after = pd.read_csv(out / "attributions.csv").set_index("path")["target"]
    assert (after[before.index] == 1 - before).all()
    both = (files / "m.csv", tmp_path / "m.csv", "--target", "label")
    assert main(command(files, "attribute", tmp_path / "both", *both)) == 1
    assert "label: expected one per image, got another in" in capsys.readouterr().err.replace("\n", " ")


def test_groups_and_masks_are_those_of_the_options(files, tmp_path):
    table = read_manifest(files / "m.csv")
    shown = {int(path[-5]): group for path, group in zip(table["path"], table["group"], strict=True)}
    metrics = ("pointing_game", "relevance_mass")
    assert main(command(files, "evaluate", tmp_path / "a", files / "m.csv", metrics=metrics)) == 0
    found = pd.read_parquet(tmp_path / "a" / "scores.parquet")
    for path, group in zip(found["path"], found["group"], strict=True):
        assert group == (shown[int(path[-5])] or f"image {path}")
    errors = pd.read_csv(tmp_path / "a" / "score_errors.csv")
    assert {path[-5] for path in errors["path"]} == {"5"}
    assert set(errors["message"]) == {"no mask: expected one in its manifest"}

    for i in range(5):  # the same as the option of the command line
        (tmp_path / "masks").mkdir(exist_ok=True)
        (tmp_path / "masks" / f"{i}.png").write_bytes((files / "marks" / f"m{i}.png").read_bytes())
    options = ("--masks", tmp_path / "masks")
    assert main(command(files, "evaluate", tmp_path / "b", files / "images", *options, metrics=metrics)) == 0
    other = pd.read_parquet(tmp_path / "b" / "scores.parquet")
    merged = found.merge(other, on="path")
    assert len(merged) == 6
    for name in ("pointing_game", "relevance_mass"):
        pd.testing.assert_series_equal(merged[f"{name}_x"], merged[f"{name}_y"], check_names=False)


def test_groups_of_a_manifest_stay_on_one_side(files, tmp_path, capsys):
    sizes = ["--expansion", "1", "--k", "4", "--batch-tokens", "100", "--held-out", "0.4", "--buffer", "200"]
    more = [files / "m.csv", "--split", "train", "--layers", "1", *sizes]
    assert main(command(files, "train-sae", tmp_path / "a", *more)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 images of split train" in said
    assert "held out" in said


def test_wrong_manifests_are_one_line(files, tmp_path, capsys):
    changed = tmp_path / "changed"
    changed.mkdir()
    Image.new("L", (20, 20), 9).save(changed / "a.png")
    rows = [{"path": changed / "a.png", "label": "cat", "split": "test"}]
    write_manifest(build(rows).table, changed / "m.csv")
    Image.new("L", (20, 20), 10).save(changed / "a.png")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for images, more, message in (
        (changed / "m.csv", (), "sha256: expected the content that the manifest was made of, got another in"),
        (changed / "m.csv", ("--split", "train"), "split: expected one with images in"),
        (files / "images", ("--split", "test"), "split: expected it with a manifest (.parquet or .csv)"),
        (tmp_path / "none.csv", (), "manifest: expected a file, got"),
        (tmp_path / "other.csv", (), "manifest: expected the columns"),
    ):
        assert main(command(files, "attribute", tmp_path / "out", images, *more)) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
