"""Fine-tuning: it learns, it goes on where it was stopped with the same weights, and it reports what it should."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastfg
from fastfg.cli import main
from fastfg.data import from_folder, manifest, split
from fastfg.data.manifest import content_hash, write_manifest
from fastfg.study import finetune as module
from fastfg.study.backbone import start_model, trained_labels
from fastfg.study.classifier_data import Features, order, seeded
from fastfg.study.finetune import FineTuning, finetune
from fastfg.study.fit import class_weights, fit

NAME = "test_vit"  # of timm: 0.4 million parameters
FAST = FineTuning(epochs=3, warmup_epochs=0, batch_size=8, lr=3e-4, crop_scale=(0.8, 1.0))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """48 pictures: 36 dark above, 12 dark below."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        pixels = rng.integers(0, 60, (40, 40), dtype=np.uint8)
        rows = slice(0, 20) if i % 4 else slice(20, 40)
        pixels[rows] += 150
        file = root / ("above" if i % 4 else "below") / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    return split(from_folder(root).table, validation=0.25, test=0.25, seed=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a tiny ViT for 32 x 32, with a head for 7 classes."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, num_classes=7)
    file = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_file(model.state_dict(), file)
    return file


def run(table, weights, out, recipe=FAST, **options):
    return finetune(table, out, model=NAME, weights=weights, img_size=32, recipe=recipe, **options)


def same(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_writes_what_attribute_reads(table, weights, tmp_path):
    lines = []
    done = run(table, weights, tmp_path / "out", say=lines.append)
    assert done.labels == ("above", "below")
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert lines[0].startswith("Epoch 0: loss ")
    model, transform = fastfg.models.load(NAME, done.weights)
    assert trained_labels(model) == ("above", "below")
    rows = table[table["split"] == "test"]
    with torch.no_grad():
        images = torch.stack([transform(Image.open(path)) for path in rows["path"]])
        answers = [done.labels[i] for i in model(images).argmax(1)]
    right = float(np.mean([answer == label for answer, label in zip(answers, rows["label"], strict=True)]))
    assert right == done.accuracy["test"].accuracy
    assert fastfg.attribute(model, images[:1]).maps.shape == (1, 2, 2)
    written = list(csv.DictReader((tmp_path / "out/accuracy.csv").open()))
    assert [(row["split"], row["label"]) for row in written] == [
        (name, label) for name in ("validation", "test") for label in done.labels
    ]
    assert sum(int(row["images"]) for row in written if row["split"] == "test") == len(rows)
    assert not (tmp_path / "out/checkpoint.safetensors").exists()


def test_a_finished_run_is_read(table, weights, tmp_path, monkeypatch):
    first = run(table, weights, tmp_path)
    monkeypatch.setattr(module, "fit", None)
    again = run(table.sample(frac=1, random_state=0), weights, tmp_path)
    assert again == first


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(("head_only", "after"), [(False, 1), (True, 0)])
def test_a_stopped_run_ends_with_the_same_weights(table, weights, tmp_path, head_only, after):
    recipe = FineTuning(
        head_only=head_only, epochs=3, warmup_epochs=1, batch_size=8, layer_decay=None if head_only else 0.7
    )
    whole = run(table, weights, tmp_path / "whole", recipe)

    def stop(text):
        if text.startswith(f"Epoch {after}:"):
            raise StoppedError

    with pytest.raises(StoppedError):
        run(table, weights, tmp_path / "stopped", recipe, say=stop)
    assert not (tmp_path / "stopped/weights.safetensors").exists()
    said = []
    resumed = run(table, weights, tmp_path / "stopped", recipe, say=said.append)
    assert [line.split(":")[0] for line in said] == [f"Epoch {epoch}" for epoch in range(after + 1, 3)]
    assert same(whole.weights, resumed.weights)
    assert resumed.history == whole.history
    assert resumed.accuracy == whole.accuracy
    for name in ("history.csv", "accuracy.csv", "finetune.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_workers_and_the_callers_random_numbers_change_nothing(table, weights, tmp_path):
    recipe = FineTuning(epochs=1, warmup_epochs=0, batch_size=8, auto_augment="rand-m9-mstd0.5", color_jitter=0.3)
    first = run(table, weights, tmp_path / "a", recipe)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    second = run(table, weights, tmp_path / "b", recipe, workers=2)
    assert same(first.weights, second.weights)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_head_only_leaves_the_backbone(table, weights, tmp_path):
    done = run(table, weights, tmp_path, FineTuning(head_only=True, epochs=30, lr=1e-2))
    before, after = load_file(weights), load_file(done.weights)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head."))
    assert after["head.weight"].shape == (2, 64)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert not (tmp_path / "features.safetensors").exists()


def test_early_stopping(tmp_path):
    """The validation labels are the opposite of the training labels, so the first epoch is the best."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4)
    y = torch.tensor([0, 1] * 4)
    network = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(network.weight)
    recipe = FineTuning(head_only=True, epochs=50, warmup_epochs=0, lr=0.1, patience=3)
    source = Features({"train": (x, y), "validation": (x, 1 - y)}, 4, 0)
    seen = []

    def progress(epoch, figures):
        seen.append(network.weight.clone())

    state = fit(network, source, ("a", "b"), recipe, torch.ones(2), tmp_path / "c.safetensors", {}, progress)
    losses = [figures["validation_loss"] for figures in state.history]
    assert losses == sorted(losses)
    assert (state.best_epoch, len(losses)) == (0, 1 + 3)
    assert torch.equal(network.weight, seen[0])


def test_other_settings_in_the_same_folder_are_refused(table, weights, tmp_path):
    run(table, weights, tmp_path)
    with pytest.raises(ValueError, match="out: expected the settings of the run in .*, or a new folder, got recipe"):
        run(table, weights, tmp_path, FineTuning(epochs=2, lr=1e-3))
    with pytest.raises(ValueError, match="got images"):
        run(table.iloc[1:], weights, tmp_path)


def test_of_two_runs_that_start_at_once_the_second_is_refused(table, weights, tmp_path, monkeypatch):
    alone, out = module.alone, tmp_path / "out"

    def after_the_other(*given):
        monkeypatch.setattr(module, "alone", alone)
        run(table, weights, out, FineTuning(epochs=1, warmup_epochs=0))
        return alone(*given)

    monkeypatch.setattr(module, "alone", after_the_other)
    with pytest.raises(ValueError, match=r"out: expected the settings of the run in .* got recipe\.epochs 2"):
        run(table, weights, out, FineTuning(epochs=2, warmup_epochs=0))


def test_a_refused_command_does_not_change_what_the_folder_says(table, weights, tmp_path, capsys):
    write_manifest(table, tmp_path / "m.parquet")
    command = ["finetune", str(tmp_path / "m.parquet"), "--model", NAME, "--weights", str(weights), "--img-size", "32"]
    command += ["--head-only", "--out", str(tmp_path / "out")]
    assert main([*command, "--epochs", "2"]) == 0
    before = (tmp_path / "out/fastfg.json").read_bytes()
    assert main([*command, "--epochs", "3"]) == 1
    assert "recipe.epochs 3 (there: 2)" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out/fastfg.json").read_bytes() == before


def test_unreadable_images_are_named_or_stop_it(table, weights, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    victim = table.index[table["split"] == "train"][0]
    broken = table.copy()
    broken.loc[victim, "path"] = str(bad)
    with pytest.raises(ValueError, match="sha256: expected the content that the manifest was made of, got .*bad.png"):
        run(broken, weights, tmp_path / "a")
    broken.loc[victim, "sha256"] = content_hash(bad)
    with pytest.raises(ValueError, match="max_failures: expected at most 0.00% of 48 .*, got 1, .*bad.png"):
        run(broken, weights, tmp_path / "a")
    done = run(broken, weights, tmp_path / "b", max_failures=0.1)
    assert list(done.unreadable) == [str(bad)]
    assert "Not read, and in no figure: 1 images, see errors.csv" in done.sentences()
    assert (tmp_path / "b/errors.csv").read_text().startswith("path,error\n" + str(bad))
    head = run(broken, weights, tmp_path / "c", FineTuning(head_only=True, epochs=2), max_failures=0.1)
    assert list(head.unreadable) == [str(bad)]


def test_an_image_that_was_not_read_before_a_stop_is_named(table, weights, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"broken")
    broken = table.copy()
    broken.loc[table.index[table["split"] == "train"][0], ["path", "sha256"]] = str(bad), content_hash(bad)

    def stop(text):
        raise StoppedError

    with pytest.raises(StoppedError):
        run(broken, weights, tmp_path / "out", FineTuning(epochs=1, warmup_epochs=0), max_failures=0.1, say=stop)
    done = run(broken, weights, tmp_path / "out", FineTuning(epochs=1, warmup_epochs=0), max_failures=0.1)
    assert list(done.unreadable) == [str(bad)]  # no training image was read again


def test_a_folder_is_hashed_once(table, weights, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(manifest, "content_hash", lambda file: hashed.append(file) or content_hash(file))
    folder = Path(table["path"][0]).parent.parent
    more = ["--model", NAME, "--weights", str(weights), "--img-size", "32", "--epochs", "2", "--head-only"]
    assert main(["finetune", str(folder), *more, "--out", str(tmp_path / "out")]) == 0
    assert len(hashed) == len(table)
    write_manifest(table, tmp_path / "m.parquet")
    assert main(["finetune", str(tmp_path / "m.parquet"), *more, "--out", str(tmp_path / "out2")]) == 0
    assert len(hashed) == 2 * len(table)  # a manifest may be older than its images


def test_what_is_no_training_set(table, weights, tmp_path):
    one = table[table["label"] == "above"]
    with pytest.raises(ValueError, match=r"label: expected training images of at least 2 classes, got \['above'\]"):
        run(one, weights, tmp_path)
    with pytest.raises(ValueError, match="split: expected validation images"):
        run(table[table["split"] != "validation"], weights, tmp_path)
    odd = table.copy()
    odd.loc[odd.index[odd["split"] == "test"][0], "label"] = "sideways"
    with pytest.raises(ValueError, match=r"label: expected classes of training images in test, got \['sideways'\]"):
        run(odd, weights, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"warmup_epochs": 20}, "warmup_epochs: expected 0 to 19, got 20"),
        ({"lr": -1.0}, "lr: expected a number > 0, got -1.0"),
        ({"class_weights": "some"}, "class_weights: expected balanced or none, got 'some'"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale: expected 0 < low <= high <= 1, got 0.0 and 1.0"),
        ({"layer_decay": 1.5}, "layer_decay: expected a number above 0 and at most 1, got 1.5"),
        ({"hflip": 2.0}, "hflip: expected 0 to 1, got 2.0"),
    ],
)
def test_recipes_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FineTuning(**options)


def test_class_weights_by_hand():
    assert class_weights(("a", "b"), ["a"] * 3 + ["b"], "balanced").tolist() == pytest.approx([4 / 6, 2.0])
    assert class_weights(("a", "b"), ["a", "b", "b"], "none").tolist() == [1, 1]
    with pytest.raises(ValueError, match="label: expected training images of each class, got none of 'b'"):
        class_weights(("a", "b"), ["a"], "balanced")


def test_a_loss_that_is_not_finite_stops_it(table, weights, tmp_path):
    with pytest.raises(ValueError, match="lr: expected a finite loss, got|expected finite logits"):
        run(table, weights, tmp_path, FineTuning(epochs=5, warmup_epochs=0, lr=1e30, optimizer="sgd"))


def test_start_model(weights, tmp_path):
    start = start_model(NAME, weights, ("a", "b"), img_size=64, seed=5)  # the positions are resized
    assert start.model.pos_embed.shape == (1, 17, 64)
    assert start.model_args == {"img_size": 64}
    again = start_model(NAME, weights, ("a", "b"), img_size=64, seed=5)
    assert torch.equal(start.model.head.weight, again.model.head.weight)
    kept = start_model(NAME, weights, tuple("abcdefg"), img_size=32)
    assert torch.equal(kept.model.head.weight, load_file(weights)["head.weight"])
    with pytest.raises(ValueError, match="weights: expected --weights FILE"):
        start_model(NAME, None, ("a", "b"))
    state = load_file(weights)
    del state["blocks.3.mlp.fc1.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="weights: expected those of .*, got .* with no blocks.3.mlp.fc1.weight"):
        start_model(NAME, tmp_path / "w.safetensors", ("a", "b"), img_size=32)


def test_order_and_seeds():
    assert sorted(order(10, 0, 1)) == list(range(10))
    assert order(10, 0, 1) == order(10, 0, 1) != order(10, 0, 2)
    with seeded("a", "b"):
        first = torch.rand(1), random.random(), np.random.rand()
    with seeded("a", "b"):
        assert (torch.rand(1), random.random(), np.random.rand()) == first


def test_figures_are_json(table, weights, tmp_path):
    run(table, weights, tmp_path)
    described = json.loads((tmp_path / "finetune.json").read_text())
    assert set(described["accuracy"]["test"]) == {"images", "accuracy", "majority", "balanced_accuracy", "confusion"}
