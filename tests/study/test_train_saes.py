"""SAEs from tokens on disk: the split, what is resumed, what is refused, and what an SAE says of itself."""

import dataclasses
import json
import sys

import pytest
import torch

import fastfg
from fastfg.sae.recipe import Recipe
from fastfg.sae.report import report
from fastfg.sae.trainer import SAETrainer
from fastfg.study import cache_tokens, train_saes
from fastfg.study.claims import alone
from fastfg.study.train_saes import CHECKPOINT
from tests.tools import tiny_vit

RECIPE = Recipe(n_features=48, k=5, steps=9, batch_size=64, k_aux=4, dead_after=200)
LAYERS = (1, 2)
OPTIONS = {"held_out": 0.25, "buffer": 256, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    images = torch.randn(16, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    keys = [f"image {i}" for i in range(16)]
    return cache_tokens(tiny_vit(torch.float32), [(images, keys)], LAYERS, tmp_path_factory.mktemp("t") / "cache")


def weights(folder, kind="trained"):
    return {layer: fastfg.load_saes(folder / kind, layers=layer)[layer].state_dict() for layer in LAYERS}


def same(a, b):
    return all(torch.equal(a[layer][name], b[layer][name]) for layer in LAYERS for name in a[layer])


def test_one_sae_per_kind_and_layer(cache, tmp_path):
    seen = []

    def track(title):
        return lambda done, total, figures: seen.append((title, done, total, *figures))

    found = train_saes(cache, tmp_path, RECIPE, kinds=("trained", "random"), track=track, **OPTIONS)
    assert list(found) == [("trained", 1), ("trained", 2), ("random", 1), ("random", 2)]
    figures = ("explained_variance", "l0", "dead_share", "tokens_per_second")
    assert seen == [(f"trained, block {layer}", 9, 9, *figures) for layer in LAYERS]
    _, held_out = cache.split(0.25, seed=RECIPE.seed)
    for (kind, layer), one in found.items():
        sae = fastfg.load_saes(tmp_path / kind, layers=layer)[layer]
        expected = report(sae, cache.tokens(layer, held_out), steps=0 if kind == "random" else 9)
        assert one == expected
        assert one.tokens == len(held_out) * 24
        said = sae.provenance
        assert said["layer"] == layer
        assert said["recipe"] == dataclasses.replace(RECIPE, kind=kind).as_dict()
        assert said["weights"] == cache.recipe["weights"][str(layer)]
        assert said["data"]["images"] == 12
        assert said["validation"]["explained_variance"] == one.explained_variance
        assert not (tmp_path / kind / f"layer_{layer}" / CHECKPOINT).exists()


@pytest.mark.parametrize(("after", "left"), [(1, 18), (3, 16), (12, 7)])
def test_a_killed_run_goes_on_to_the_same_weights(cache, tmp_path, monkeypatch, after, left):
    """Killed before the first checkpoint, after one, and in the second SAE."""
    train_saes(cache, tmp_path / "whole", RECIPE, **OPTIONS)
    train, steps = SAETrainer.train, []

    def dies(self, x):
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(self.done)
        return train(self, x)

    monkeypatch.setattr(SAETrainer, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        train_saes(cache, tmp_path / "killed", RECIPE, **OPTIONS)
    again = []
    monkeypatch.setattr(SAETrainer, "train", lambda self, x: (again.append(self.done), train(self, x))[1])
    train_saes(cache, tmp_path / "killed", RECIPE, **OPTIONS)
    assert len(again) == left
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    again.clear()
    assert train_saes(cache, tmp_path / "killed", RECIPE, **OPTIONS)
    assert again == []


def test_a_checkpoint_of_tokens_in_other_shards_is_refused(tmp_path, monkeypatch):
    """Their order and their scale would be other ones. Tokens of other images, added meanwhile, change nothing."""
    images = torch.randn(16, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    keys = [f"image {i}" for i in range(16)]
    model, train = tiny_vit(torch.float32), SAETrainer.train

    def stop(self, x):
        if self.done == 3:
            raise KeyboardInterrupt
        return train(self, x)

    def write(folder, *parts):
        return cache_tokens(model, [(images[part], keys[part]) for part in parts], LAYERS, folder, shard_bytes=1)

    first, rest = slice(0, 12), slice(12, 16)
    cache, of = write(tmp_path / "a", first), {"keys": keys[:12], "layers": 1, **OPTIONS}
    train_saes(cache, tmp_path / "whole", RECIPE, **of)
    monkeypatch.setattr(SAETrainer, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        train_saes(cache, tmp_path / "stopped", RECIPE, **of)
    monkeypatch.undo()
    others = write(tmp_path / "b", slice(0, 5), slice(5, 12))
    with pytest.raises(ValueError, match="^out: expected a checkpoint with shards .*remove it to start again"):
        train_saes(others, tmp_path / "stopped", RECIPE, **of)
    train_saes(write(tmp_path / "a", first, rest), tmp_path / "stopped", RECIPE, **of)
    expected, found = (fastfg.load_saes(tmp_path / name / "trained")[1] for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_another_recipe_in_the_same_folder_is_refused(cache, tmp_path):
    train_saes(cache, tmp_path, RECIPE, **OPTIONS)
    with pytest.raises(ValueError, match="^out: expected a new folder, or SAEs with recipe .*, got .*layer_1"):
        train_saes(cache, tmp_path, dataclasses.replace(RECIPE, lr=5e-4), **OPTIONS)
    with pytest.raises(ValueError, match="^out: expected a new folder, or SAEs with data "):
        train_saes(cache, tmp_path, RECIPE, **{**OPTIONS, "held_out": 0.5})


def test_no_group_is_on_both_sides(cache, tmp_path):
    groups = {key: int(key.split()[1]) // 4 for key in cache.keys}
    train_saes(cache, tmp_path, RECIPE, layers=[2], groups=groups, **OPTIONS)
    stored = json.loads((tmp_path / "trained" / "layer_2" / "report.json").read_text())
    assert stored["data"]["grouped"]
    assert stored["data"]["held_out_images"] == 4
    trained, held_out = cache.split(0.25, groups=groups)
    assert not {groups[key] for key in trained} & {groups[key] for key in held_out}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [5]}, r"layers: expected some of \(1, 2\), which .* holds, got \[5\]"),
        ({"kinds": ["frozen"]}, r"kinds: expected some of .*, got \['frozen'\]"),
        ({"kinds": []}, r"kinds: expected some of .*, got \[\]"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1, got 0"),
        ({"held_out": 1.0}, "held_out: "),
        ({"buffer": 65}, "buffer: expected at least two batches of 64 tokens, got 65"),
    ],
)
def test_wrong_arguments_are_named(cache, tmp_path, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train_saes(cache, tmp_path, RECIPE, **{**OPTIONS, **given})


def test_too_few_tokens_for_a_batch(cache, tmp_path):
    recipe = dataclasses.replace(RECIPE, batch_size=10**6)
    with pytest.raises(ValueError, match="^batch_size: expected at most the 288 tokens to train on, got 1000000"):
        train_saes(cache, tmp_path / "out", recipe, held_out=0.25)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="^buffer: expected at least two batches of 64 tokens, got 65"):
        train_saes(cache, tmp_path / "out", RECIPE, held_out=0.25, buffer=65)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "acts"), [(9, False), (100, True)])
def test_the_rows_at_the_limit_of_soft_frozen_are_reported(cache, tmp_path, monkeypatch, steps, acts):
    recipe = dataclasses.replace(RECIPE, steps=steps, lr=2e-2)
    options = {"layers": 1, **OPTIONS, "checkpoint_every": 4}
    kinds = ("trained", "soft-frozen")
    train_saes(cache, tmp_path / "out", recipe, kinds=kinds, **options)
    stored = {kind: json.loads((tmp_path / "out" / kind / "layer_1" / "report.json").read_text()) for kind in kinds}
    assert "rows_at_limit" not in stored["trained"]
    assert 0 <= stored["soft-frozen"]["rows_at_limit"] <= 1
    assert (stored["soft-frozen"]["rows_at_limit"] > 0) == acts
    train, steps_done = SAETrainer.train, []

    def dies(self, x):
        if len(steps_done) == 6:
            raise KeyboardInterrupt
        steps_done.append(self.done)
        return train(self, x)

    monkeypatch.setattr(SAETrainer, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        train_saes(cache, tmp_path / "killed", recipe, kinds="soft-frozen", **options)
    monkeypatch.setattr(SAETrainer, "train", train)
    train_saes(cache, tmp_path / "killed", recipe, kinds="soft-frozen", **options)
    again = json.loads((tmp_path / "killed" / "soft-frozen" / "layer_1" / "report.json").read_text())
    assert again == stored["soft-frozen"]  # a run that was stopped compares with the start, too


def test_rows_that_left_the_limit_count(cache, tmp_path, monkeypatch):
    """The rows come back to their start in the second half, also where the run is killed there and goes on."""
    recipe = dataclasses.replace(RECIPE, steps=12, lr=0.3)
    options = {"layers": 1, **OPTIONS, "checkpoint_every": 4, "kinds": "soft-frozen"}
    train, seen = SAETrainer.train, {"start": None, "die": False}

    def comes_back(self, x):
        if seen["start"] is None:
            seen["start"] = self.W_dec.clone()
        if seen["die"] and self.done == 9:
            raise KeyboardInterrupt
        found = train(self, x)
        if self.done > 6:
            self.W_dec.copy_(seen["start"])
        return found

    def share(name):
        return json.loads((tmp_path / name / "soft-frozen" / "layer_1" / "report.json").read_text())["rows_at_limit"]

    monkeypatch.setattr(SAETrainer, "train", comes_back)
    train_saes(cache, tmp_path / "whole", recipe, **options)
    seen["die"] = True
    with pytest.raises(KeyboardInterrupt):
        train_saes(cache, tmp_path / "killed", recipe, **options)
    seen["die"] = False
    train_saes(cache, tmp_path / "killed", recipe, **options)
    assert share("whole") == share("killed") > 0
    names = {file.name for file in (tmp_path / "killed" / "soft-frozen" / "layer_1").iterdir()}
    assert names == {".lock", "config.json", "report.json", "sae.safetensors"}


def test_the_reported_tokens_are_drawn_from_the_whole_grid(monkeypatch, tmp_path):
    """A fixed step through the patches would meet the same column of every image."""
    cache = cache_tokens(
        tiny_vit(torch.float32),
        [(torch.randn(40, 3, 32, 48, generator=torch.Generator().manual_seed(4)), None)],
        [1],
        tmp_path / "cache",
    )
    module = sys.modules["fastfg.study.train_saes"]  # the package has the function of that name
    monkeypatch.setattr(module, "REPORTED", 120)
    seen, kept = [], report

    def look(sae, x, **options):
        seen.append(x)
        return kept(sae, x, **options)

    monkeypatch.setattr(module, "report", look)
    train_saes(cache, tmp_path / "out", RECIPE, held_out=0.5, buffer=256)
    (tokens,) = seen
    assert len(tokens) == 120  # of 20 images with 24 patches
    every = cache.tokens(1).unflatten(0, (40, 24))
    places = {int((every == token).all(-1).nonzero()[0, 1]) for token in tokens}
    assert len(places) > 20


def test_what_is_damaged_is_named(cache, tmp_path):
    train_saes(cache, tmp_path, RECIPE, **OPTIONS)
    folder = tmp_path / "trained" / "layer_1"
    for name in ("sae.safetensors", "report.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:9])
        with pytest.raises(ValueError, match=r"^out: expected an SAE and its report in .*layer_1, got .*\(remove the"):
            train_saes(cache, tmp_path, RECIPE, **OPTIONS)
        (folder / name).write_bytes(whole)
    whole = (folder / "report.json").read_text()
    said = json.loads(whole)
    for wrong in (
        [],
        {},
        said | {"report": said["report"] | {"more": 1}},
        said | {"report": said["report"] | {"l0": "a"}},
    ):
        (folder / "report.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"^out: expected an SAE and its report in .*layer_1, got .*\(remove the"):
            train_saes(cache, tmp_path, RECIPE, **OPTIONS)
    (folder / "report.json").write_text(whole)
    (folder / "sae.safetensors").write_bytes((tmp_path / "trained" / "layer_2" / "sae.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"^out: expected the SAE that .*report.json reports on in .*, got another one"
    ):
        train_saes(cache, tmp_path, RECIPE, **OPTIONS)
    (folder / "report.json").unlink()
    (folder / CHECKPOINT).write_bytes(b"")
    with pytest.raises(ValueError, match=f"^out: expected a checkpoint in .*{CHECKPOINT}, got .*remove it"):
        train_saes(cache, tmp_path, RECIPE, **OPTIONS)


def test_kinds_and_layers_may_be_one_or_an_iterator(cache, tmp_path):
    assert list(train_saes(cache, tmp_path, RECIPE, kinds="random", layers=1, **OPTIONS)) == [("random", 1)]
    kinds, layers = iter(["random", "trained"]), iter([1, 2])
    found = train_saes(cache, tmp_path, RECIPE, kinds=kinds, layers=layers, **OPTIONS)
    assert list(found) == [("random", 1), ("random", 2), ("trained", 1), ("trained", 2)]


def test_only_the_named_images_are_used(cache, tmp_path):
    train_saes(cache, tmp_path, RECIPE, layers=[1], keys=[f"image {i}" for i in range(8)], **OPTIONS)
    data = json.loads((tmp_path / "trained" / "layer_1" / "report.json").read_text())["data"]
    assert (data["images"], data["held_out_images"]) == (6, 2)


def test_an_sae_that_another_run_trains_is_refused(cache, tmp_path):
    with alone(tmp_path / "trained" / "layer_2", "out"):
        with pytest.raises(ValueError, match="^out: expected a folder that no other process writes"):
            train_saes(cache, tmp_path, RECIPE, layers=2)
        assert set(train_saes(cache, tmp_path, RECIPE, layers=1)) == {("trained", 1)}  # another SAE of the same folder
