"""Every error message names the argument, what was expected, and what was given."""

import dataclasses
import re

import pytest
import torch

import fastfg
from tests.tools import random_sae, tiny_vit


def refuses(error, *parts):
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


@pytest.mark.parametrize(
    ("bad", "error", "parts"),
    [
        (lambda x: x[0], ValueError, ("images: expected [B, 3, H, W]", "got [3, 32, 48]")),
        (lambda x: x[:, :1], ValueError, ("images: expected [B, 3, H, W]", "got [3, 1, 32, 48]")),
        (lambda x: x.numpy(), TypeError, ("images: expected a tensor", "got ndarray")),
        (lambda x: x.float(), TypeError, ("images: expected torch.float64", "got torch.float32")),
        (lambda x: (x * 255).byte(), TypeError, ("images: expected torch.float64", "got torch.uint8")),
        (lambda x: x.to("meta"), ValueError, ("images: expected them on cpu, as the model is", "got meta")),
        (lambda x: x[..., :40], ValueError, ("images: expected 32 x 48 pixels", "got 32 x 40")),
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), ValueError, ("finite pixels", "image(s) [1]")),
    ],
)
def test_images(model, images, bad, error, parts):
    with refuses(error, *parts):
        fastfg.attribute(model, bad(images))
    with refuses(error, *parts):
        fastfg.evaluate(model, bad(images), torch.rand(3, 4, 6), target=0)
    with refuses(error, *parts):
        fastfg.residuals(model, bad(images), [0])


def test_images_that_patches_do_not_fill():
    model = tiny_vit(dynamic_img_size=True)
    assert fastfg.attribute(model, torch.randn(1, 3, 24, 64).double()).maps.shape == (1, 3, 8)
    with refuses(ValueError, "multiples of the patch 8 x 8", "got 24 x 60"):
        fastfg.attribute(model, torch.randn(1, 3, 24, 60).double())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"kappa": 0}, ("kappa: expected a number > 0", "got 0")),
        ({"kappa": float("nan")}, ("kappa: expected a number > 0", "got nan")),
        ({"c_max": 1}, ("c_max: expected a number > 1", "got 1")),
        ({"c_max": float("inf")}, ("c_max: expected a number > 1", "got inf")),
        ({"layers": ()}, ("layers: expected distinct 0-based blocks", "got ()")),
        ({"layers": (1, 1)}, ("layers: expected distinct", "got (1, 1)")),
        ({"layers": (-1,)}, ("layers: expected distinct", "got (-1,)")),
        ({"score": "best"}, ("score: expected one of", "got 'best'")),
        ({"score": "gradient", "shuffle_seed": 1}, ("shuffle_seed: expected None", "got 1")),
        ({"score": "gradient_x_residual", "rescale": True}, ("rescale: expected False", "got True")),
    ],
)
def test_gate(options, parts):
    with refuses(ValueError, *parts):
        fastfg.Gate(**({"layers": (2, 3)} | options))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"layers": (2.7,)}, ("layers: expected integers", "got (2.7,)")),
        ({"layers": 2.0}, ("layers: expected integers", "got 2.0")),
        ({"layers": True}, ("layers: expected integers", "got True")),
        ({"layers": (1, True)}, ("layers: expected integers", "got (1, True)")),
        ({"layers": "23"}, ("layers: expected integers", "got '23'")),
        ({"blurred": 1}, ("blurred: expected True or False", "got 1")),
        ({"rescale": 1}, ("rescale: expected True or False", "got 1")),
        ({"shuffle_seed": 1.5}, ("shuffle_seed: expected integers", "got [1.5]")),
    ],
)
def test_gate_arguments_of_the_wrong_type(options, parts):
    with refuses(TypeError, *parts):
        fastfg.Gate(**({"layers": (2, 3)} | options))


@pytest.mark.parametrize("seed", [1.0, True, "1", None])
def test_seeds(model, images, seed):
    with refuses(TypeError, "seed: expected an int", f"got {seed!r}"):
        fastfg.attribute(model, images, seed=seed)
    with refuses(TypeError, "seed: expected an int", f"got {seed!r}"):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=0, seed=seed)


def test_missing_layers(model, images, saes):
    with refuses(ValueError, "gate.layers: expected blocks from 0 to 3", "got [9]"):
        fastfg.attribute(model, images, saes=saes, gate=fastfg.Gate((1, 9)))
    with refuses(ValueError, "saes: expected an SAE for each gated block [1, 3]", "none for [3]"):
        fastfg.attribute(model, images, saes=saes, gate=fastfg.Gate((1, 3)))
    with refuses(ValueError, "saes: expected", "none for [1]"):
        fastfg.attribute(model, images, gate=fastfg.Gate((1,)))
    with refuses(TypeError, "gate: expected a fastfg.Gate", "got dict"):
        fastfg.attribute(model, images, saes=saes, gate=[{"layers": 1}])
    with refuses(ValueError, "gate: expected", "got an empty list"):
        fastfg.attribute(model, images, gate=[])
    with refuses(ValueError, "layers: expected blocks from 0 to 3, as the model has, got [4]"):
        fastfg.residuals(model, images, [4])


def test_sae_of_another_width(model, images, gate):
    with refuses(ValueError, "saes[2]: expected width 32", "got 16"):
        fastfg.attribute(model, images, saes={1: random_sae(32, 50, "relu"), 2: random_sae(16, 50, "relu")}, gate=gate)


@pytest.mark.parametrize(
    ("target", "error", "parts"),
    [
        (5, ValueError, ("target: expected classes from 0 to 4", "got [5]")),
        ([7, 5, 7], ValueError, ("target: expected classes from 0 to 4", "got [7, 5]")),
        ([0, -1, 2], ValueError, ("target: expected classes from 0 to 4", "got [-1]")),
        ([0, 1], ValueError, ("target: expected one class, or one per image (3)", "got [2]")),
        (0.5, TypeError, ("target: expected integers", "float")),
        (torch.rand(3), TypeError, ("target: expected", "a LongTensor")),
        ("cat", TypeError, ("target: expected", "'cat'")),
        (True, TypeError, ("target: expected", "True")),
    ],
)
def test_target(model, images, target, error, parts):
    with refuses(error, *parts):
        fastfg.attribute(model, images, target=target)
    with refuses(error, *parts):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=target)


def test_options(model, images):
    with refuses(ValueError, "identity: expected one of", "got 'none'"):
        fastfg.attribute(model, images, identity="none")
    with refuses(ValueError, "features: expected a number >= 0, got -1"):
        fastfg.attribute(model, images, features=-1)
    with refuses(ValueError, "backend: expected 'auto' or one of", "got 'gpu'"):
        fastfg.attribute(model, images, backend="gpu")
    with pytest.raises(RuntimeError, match="backend: 'triton' can't run relevancy: "):
        fastfg.attribute(model, images, backend="triton")


def test_models(images):
    with refuses(TypeError, "model: expected a fastfg.models.Adapter", "timm.models.eva.Eva", "got torch.nn", "Linear"):
        fastfg.attribute(torch.nn.Linear(2, 2), images)
    with refuses(ValueError, "model: expected global_pool to be one of", "got 'max'"):
        fastfg.attribute(tiny_vit(global_pool="max"), images)
    with refuses(ValueError, "model: expected floating logits [3, n]", "got torch.float64 [3, 4, 8]"):
        model = tiny_vit(num_classes=0)
        model.head = torch.nn.Unflatten(1, (4, 8))
        fastfg.attribute(model, images)


def test_an_adapter_that_miscounts_tokens_is_never_a_wrong_map(model, images):
    wrong = dataclasses.replace(fastfg.models.adapt(model), num_prefix_tokens=2)
    with pytest.raises(RuntimeError, match="model: expected 26 tokens in block 0, met 25"):
        fastfg.attribute(wrong, images)


def test_a_block_without_attention_is_never_a_wrong_map(model, images):
    class NoAttention(torch.nn.Module):
        def forward(self, x, **_):
            return x

    model.blocks[1].attn = NoAttention()
    with pytest.raises(RuntimeError, match="in each of its 4 blocks and 0 after them, met 3"):
        fastfg.attribute(model, images)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"maps": torch.rand(2, 4, 6)}, ("maps: expected 3 of them", "got [2, 4, 6]")),
        ({"maps": torch.rand(3, 6, 4)}, ("maps: expected 4 x 6 patches", "got [3, 6, 4]")),
        (
            {"maps": torch.rand(3, 24)},
            ("maps: expected floating [B, gh, gw] or [C, B, gh, gw]", "got torch.float32 [3, 24]"),
        ),
        ({"keys": ["a"]}, ("keys: expected 3 of them", "got 1")),
        ({"batch_size": 0}, ("batch_size: expected at least 1", "got 0")),
        ({"metrics": ["sako"]}, ("metrics: expected names among", "got 'sako'")),
        ({"baseline": "grey"}, ("baseline: expected one of", "got 'grey'")),
        ({"baseline": float("nan")}, ("baseline: expected a finite number", "got nan")),
        ({"baseline": torch.zeros(2)}, ("baseline: expected a tensor [3] or [3, 3]", "got [2]")),
        ({"baseline": "black"}, ("baseline: 'black' is a colour in pixel space",)),
        ({"saco": {"n_bins": 1}}, ("saco: expected n_bins >= 2, an integer", "got 1")),
        ({"saco": {"n_bins": 25}}, ("saco: expected n_bins from 2 to 24", "got 25")),
        ({"saco": {"n_bins": 4.0}}, ("saco: expected n_bins >= 2, an integer", "got 4.0")),
        ({"pixel_flipping": {"patches_per_step": True}}, ("expected patches_per_step >= 1, an integer", "got True")),
        ({"baseline": torch.full((3,), torch.nan)}, ("baseline: expected finite values", "got NaN")),
        ({"metrics": ["saco"], "pixel_flipping": {"patches_per_step": 2}}, ("pixel_flipping: expected no options",)),
        ({"saco": {"impact": "min"}}, ("saco: expected impact to be one of", "got 'min'")),
        ({"pixel_flipping": {"patches_per_step": 0}}, ("pixel_flipping: expected patches_per_step >= 1", "got 0")),
        ({"faithfulness_correlation": {"subset_size": 25}}, ("expected subset_size from 1 to 24", "got 25")),
        ({"faithfulness_correlation": {"correlation": "tau"}}, ("expected correlation in", "got 'tau'")),
        ({"faithfulness_correlation": {"n_runs": 1}}, ("expected n_runs >= 2", "got 1")),
        (
            {"faithfulness_correlation": {"subsets": torch.zeros(2, 2, 1, 3).long()}},
            ("expected subsets", "[2, 2, 1, 3]"),
        ),
        ({"faithfulness_correlation": {"subsets": torch.full((1, 2, 3, 2), 24)}}, ("patches 0 to 23", "24 to 24")),
    ],
)
def test_evaluate(model, images, change, parts):
    with refuses(ValueError, *parts):
        fastfg.evaluate(model, images, **({"maps": torch.rand(3, 4, 6), "target": 0} | change))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"keys": [None] * 3}, ("keys: expected str or int, one per image", "got None")),
        ({"keys": ["a", "b", float("nan")]}, ("keys: expected str or int, one per image", "got nan")),
        ({"keys": [0, 1, True]}, ("keys: expected str or int, one per image", "got True")),
        ({"keys": torch.rand(3)}, ("keys: expected str or int, one per image", "got 0.")),
        ({"keys": torch.zeros(3, 2)}, ("keys: expected str or int, one per image", "got tensor")),
        ({"keys": b"abc"}, ("keys: expected a sequence of str or int", "got bytes")),
        ({"keys": {"a", "b", "c"}}, ("keys: expected a sequence of str or int", "got set")),
        ({"keys": (name for name in "abc")}, ("keys: expected a sequence of str or int", "got generator")),
        ({"batch_size": 2.5}, ("batch_size: expected an int or None", "got 2.5")),
        ({"batch_size": "4"}, ("batch_size: expected an int or None", "got '4'")),
        ({"batch_size": True}, ("batch_size: expected an int or None", "got True")),
        ({"baseline": True}, ("baseline: expected a name, a number or a tensor", "got True")),
        ({"baseline": None}, ("baseline: expected a name, a number or a tensor", "got NoneType")),
        ({"saco": {"baseline": True}}, ("baseline: expected a name, a number or a tensor", "got True")),
        ({"saco": {"baseline": [0.5]}}, ("baseline: expected a name, a number or a tensor", "got list")),
        ({"baseline": torch.ones(3, dtype=torch.bool)}, ("baseline: expected a tensor of real numbers", "torch.bool")),
        ({"seed": 1.0}, ("seed: expected an int", "got 1.0")),
        ({"progress": 1}, ("progress: expected a function", "got 1")),
        ({"metrics": None}, ("metrics: expected a sequence of names or instances", "got None")),
        ({"metrics": "saco"}, ("metrics: expected a sequence of names or instances", "got 'saco'")),
    ],
)
def test_evaluate_with_arguments_of_another_type(model, images, change, parts):
    with refuses(TypeError, *parts):
        fastfg.evaluate(model, images, **({"maps": torch.rand(3, 4, 6), "target": 0} | change))


@pytest.mark.parametrize("precision", [None, ["float32"], True, torch.bfloat16])
def test_evaluate_with_another_precision(model, images, precision):
    with refuses(ValueError, "precision: expected 'auto' or one of", f"got {precision!r}"):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=0, precision=precision)


def test_evaluate_option_that_a_metric_does_not_have(model, images):
    with refuses(TypeError, "saco: unexpected option", "bins"):
        fastfg.evaluate(model, images, torch.rand(3, 4, 6), target=0, saco={"bins": 3})


def test_callables(images):
    maps = torch.rand(3, 4, 6)
    with refuses(ValueError, "model: expected floating logits [3, n]", "got torch.float64 [3, 3, 32, 48]"):
        fastfg.evaluate(lambda x: x, images, maps, target=0)
    with refuses(ValueError, "model: expected floating logits [3, n]", "got torch.int64 [3, 3]"):
        fastfg.evaluate(lambda x: x.mean((2, 3)).long(), images, maps, target=0)
    with refuses(ValueError, "maps: expected a grid that divides the images' 32 x 48", "got 5 x 6"):
        fastfg.evaluate(lambda x: x.mean((2, 3)), images, torch.rand(3, 5, 6), target=0)
    with refuses(TypeError, "model: expected a model or a callable", "got str"):
        fastfg.evaluate("vit", images, maps, target=0)


@pytest.mark.parametrize("k", [0, -1, 51])
def test_active_features_of_a_topk_sae(k):
    with refuses(ValueError, f"k: expected 1 to 50 for a topk SAE, got {k}"):
        random_sae(32, 50, "topk", k=k)
