"""The estimate of a study's cost: what it is measured on, what it refuses as the run does, and how it counts."""

from pathlib import Path

import pytest
import torch

from fastfg.data.manifest import read_manifest, write_manifest
from fastfg.study.config import read_config
from fastfg.study.cost import estimate, stages
from tests.study.studies import make_study


@pytest.fixture
def file(tmp_path):
    return make_study(tmp_path)


def cost(file, said=None):
    return estimate(read_config(file), torch.device("cpu"), (said if said is not None else []).append)


def spoil(file, split, n=None):
    table = read_manifest(file.parent / "m.parquet")
    paths = list(table.loc[table["split"] == split, "path"])[:n]
    for path in paths:
        Path(path).write_bytes(b"no image")
    return len(paths)


def keep(file, **most):
    """Keep only some images of splits."""
    table = read_manifest(file.parent / "m.parquet")
    for split, n in most.items():
        dropped = table.index[table["split"] == split][n:]
        table = table.drop(dropped)
    write_manifest(table.reset_index(drop=True), file.parent / "m.parquet")


def test_unreadable_images_are_left_out_of_the_measurement(file):
    said = []
    n = spoil(file, "validation", 4)  # a unit
    there = (read_manifest(file.parent / "m.parquet")["split"] == "validation").sum()
    assert cost(file, said).minutes() > 0
    assert ["Not read" in line for line in said] == [True] * n + [False]
    assert said[-1] == f"Measuring on {min(4, there - n)} images and cpu"


def test_no_image_that_can_be_read(file):
    n = spoil(file, "validation")
    with pytest.raises(
        ValueError, match=rf"^data\.manifest: expected validation images that can be read, got none of {n}$"
    ):
        cost(file)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_that_is_missing(file, split):
    keep(file, **{split: 0})
    with pytest.raises(ValueError, match=rf"^data\.manifest: expected at least 2 images of the split '{split}', got 0"):
        cost(file)


def test_a_label_that_only_validation_has(file):
    table = read_manifest(file.parent / "m.parquet")
    table.loc[table.index[table["split"] == "validation"][0], "label"] = "grey"
    write_manifest(table, file.parent / "m.parquet")
    with pytest.raises(ValueError, match=r"labels of all validation images .*got \['grey'\] beside \('bright', 'dark'"):
        cost(file)


def test_too_few_training_images_for_the_saes(file):
    text = file.read_text()
    start, end = text.index("[saes.folders]"), text.index("[protocol]")
    file.write_text(text[:start] + "[saes.train]\nexpansion = 1\nk = 3\nbatch_tokens = 8\n" + text[end:])
    keep(file, train=5)
    with pytest.raises(ValueError, match=r"^saes\.train: expected at least 6 training images, .*, got 5$"):
        cost(file)


def test_limited_stages_are_whole_units(file):
    config = read_config(file)
    protocol = config.protocol.model_copy(update={"layer_images": 5})
    test = config.test.model_copy(update={"shuffled_images": 1})
    table = read_manifest(config.data.manifest)
    n = table["split"].value_counts()
    found = {s.title: s.images for s in stages(config.model_copy(update={"protocol": protocol, "test": test}), table)}
    assert found["blocks, one at a time"] == min(8, n["validation"])  # units of 4
    assert found["test, shuffled decoders"] == 4
    assert found["test"] == n["test"]
