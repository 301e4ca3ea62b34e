"""Edge cases: no images, more features than exist, and a default device that is not the model's."""

import numpy as np
import pytest
import torch

import fastfg
from fastfg.attribution.patch_scores import BY_KIND
from fastfg.attribution.relevancy_pass import _warn_of_no_gradient
from fastfg.types import METHODS, SCORE_KINDS
from tests.models.families import build
from tests.tools import ACTIVATIONS, random_sae, tiny_vit

GATES = [
    None,
    fastfg.Gate((1, 2)),
    fastfg.Gate((1,), shuffle_seed=3),
    *(fastfg.Gate((1,), score=s) for s in SCORE_KINDS),
]


def test_every_kind_of_score_is_there():
    assert set(BY_KIND) == set(SCORE_KINDS)


def test_blocks_as_numpy_counts_them():
    assert fastfg.Gate(np.arange(1, 3)).layers == (1, 2)
    assert fastfg.Gate(np.int64(2)).layers == (2,)
    assert fastfg.Gate(2).layers == (2,)
    assert all(type(layer) is int for layer in fastfg.Gate(np.arange(1, 3)).layers)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_no_images(model, images, activation):
    saes = {block: random_sae(32, 100, activation, **ACTIVATIONS[activation]) for block in (1, 2)}
    found = fastfg.attribute(model, images[:0], saes=saes, gate=GATES, features=3, methods=METHODS)
    C = len(GATES)
    assert found.maps.shape == (C, 0, 4, 6)
    assert found.target.shape == (0,)
    assert found.logits.shape == (0, 5)
    for block in (1, 2):
        assert found.scores[block].shape == found.gates[block].shape == (C, 0, 24)
        assert found.features[block].indices.shape == found.features[block].values.shape == (C, 0, 24, 3)
    assert {name: tuple(maps.shape) for name, maps in found.methods.items()} == dict.fromkeys(METHODS, (0, 4, 6))
    assert fastfg.attribute(model, images[:0]).maps.shape == (0, 4, 6)
    assert found.heatmap((32, 48)).shape == (C, 0, 32, 48)


@pytest.mark.parametrize("name", ["transformers ViT", "open_clip zero-shot", "vit-prisma HookedViT"])
def test_no_images_for_models_that_refuse_empty_batches(name):
    model, images = build(name), torch.randn(0, 3, 32, 32, dtype=torch.float64)
    found = fastfg.attribute(model, images, gate=fastfg.Gate((1,), score="gradient_x_residual"), target=1)
    assert found.maps.shape == (0, 4, 4)
    assert found.scores[1].shape == (0, 16)
    assert found.target.shape == (0,)
    assert fastfg.residuals(model, images, [1])[1].shape == (0, 16, 48)


def test_targets_of_no_images(model, images):
    assert fastfg.attribute(model, images[:0], target=[]).target.dtype == torch.int64
    assert fastfg.attribute(model, images[:0], target=lambda logits: logits[:, 1]).maps.shape == (0, 4, 6)
    with pytest.raises(ValueError, match=r"target: expected one class, or one per image \(0\), got \[2\]"):
        fastfg.attribute(model, images[:0], target=[1, 2])
    with pytest.raises(ValueError, match=r"target: expected classes from 0 to 4, got \[7\]"):
        fastfg.attribute(model, images[:0], target=7)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_more_features_than_the_dictionary_has(model, images, activation):
    sae = random_sae(32, 6, activation, **({"k": 4} if activation == "topk" else {}))
    options = {"saes": {1: sae}, "gate": fastfg.Gate((1,))}
    some = fastfg.attribute(model, images, features=6, **options).features[1]
    more = fastfg.attribute(model, images, features=9, **options).features[1]
    assert more.indices.shape == more.values.shape == (3, 24, 9)
    assert torch.equal(more.indices[..., :6], some.indices)
    assert torch.equal(more.values[..., :6], some.values)
    assert (more.indices[..., 6:] == -1).all()
    assert (more.values[..., 6:] == 0).all()


@pytest.mark.parametrize("features", [2.5, True, "3"])
def test_features_must_be_a_count(model, images, features):
    with pytest.raises(ValueError, match="features: expected a number >= 0, got"):
        fastfg.attribute(model, images, features=features)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_default_device_other_than_the_models(model, images, activation):
    saes = {block: random_sae(32, 100, activation, **ACTIVATIONS[activation]) for block in (1, 2)}
    options = {"saes": saes, "gate": GATES, "features": 3, "methods": METHODS, "target": [1, 2, 0]}
    expected, heat = fastfg.attribute(model, images, **options), fastfg.attribute(model, images).heatmap((32, 48))
    pixels = fastfg.FeatureGradient(model).attribute(images, target=1)
    residuals = fastfg.residuals(model, images, [1])
    torch.set_default_device("meta")
    try:
        found = fastfg.attribute(model, images, **options)
        assert torch.equal(fastfg.attribute(model, images).heatmap((32, 48)), heat)
        assert torch.equal(fastfg.FeatureGradient(model).attribute(images, target=1), pixels)
        assert torch.equal(fastfg.residuals(model, images, [1])[1], residuals[1])
    finally:
        torch.set_default_device(None)
    assert torch.equal(found.maps, expected.maps)
    assert torch.equal(found.target, expected.target)
    for block in (1, 2):
        assert torch.equal(found.scores[block].nan_to_num(), expected.scores[block].nan_to_num())
        assert torch.equal(found.gates[block], expected.gates[block])
        assert torch.equal(found.features[block].indices, expected.features[block].indices)
        assert torch.equal(found.features[block].values, expected.features[block].values)
    for name in METHODS:
        assert torch.equal(found.methods[name], expected.methods[name])


def test_generators_and_single_blocks(model, images):
    expected = fastfg.residuals(model, images, [1, 2])
    for layers in ((n for n in (1, 2)), np.array([1, 2]), torch.tensor([1, 2])):
        found = fastfg.residuals(model, images, layers)
        assert list(found) == [1, 2]
        assert torch.equal(found[2], expected[2])
    assert list(fastfg.residuals(model, images, 1)) == [1]
    for layers in ([True], [1.0], "1", None):
        with pytest.raises(TypeError, match="layers: expected integers, got"):
            fastfg.residuals(model, images, layers)
    found = fastfg.attribute(model, images, methods=(name for name in METHODS))
    assert set(found.methods) == set(METHODS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kappa": "1"}, TypeError, "kappa: expected a number, got '1'"),
        ({"kappa": True}, TypeError, "kappa: expected a number, got True"),
        ({"c_max": None}, TypeError, "c_max: expected a number, got None"),
        ({"rescale": "no"}, TypeError, "rescale: expected True or False, got 'no'"),
        ({"shuffle_seed": 2**70}, ValueError, r"shuffle_seed: expected -2\*\*63 to 2\*\*64 - 1, got 1180591"),
    ],
)
def test_gates_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        fastfg.Gate((1,), **options)


def test_saes_that_are_not_saes(model, images, gate):
    with pytest.raises(TypeError, match=r"saes\[1\]: expected a SparseAutoencoder, got str"):
        fastfg.attribute(model, images, saes={1: "path", 2: "path"}, gate=gate)
    with pytest.raises(TypeError, match=r"saes: expected {block: SparseAutoencoder} or None, got str"):
        fastfg.attribute(model, images, saes="path", gate=gate)
    with pytest.raises(ValueError, match=r"saes: expected {block: SparseAuto.*, got a list of 3 for one gate"):
        fastfg.attribute(model, images, saes=[random_sae(32, 100, "relu")] * 3, gate=gate)
    with pytest.raises(TypeError, match=r"saes\[0\]: expected {block: SparseAutoencoder} or None, got SparseAutoenc"):
        fastfg.attribute(model, images, saes=[random_sae(32, 100, "relu")], gate=[gate])


def test_an_sae_that_no_gate_uses(model, images):
    gate = fastfg.Gate((1,), score="gradient_x_residual")
    expected = fastfg.attribute(model, images, gate=gate).maps
    saes = {1: random_sae(16, 100, "relu")}
    assert torch.equal(fastfg.attribute(model, images, saes=saes, gate=gate).maps, expected)
    with pytest.raises(ValueError, match=r"saes\[1\]: expected width 32, .* got 16"):
        fastfg.attribute(model, images, saes=saes, gate=gate, features=1)


def test_an_sae_of_another_block_is_refused(model, images, saes):
    gate = fastfg.Gate((1, 2))
    saes[2].provenance["layer"] = 1
    with pytest.raises(ValueError, match=r"saes\[2\]: expected an SAE of this block, got one of block 1"):
        fastfg.attribute(model, images, saes=saes, gate=gate)
    saes[2].provenance["layer"] = 2
    fastfg.attribute(model, images, saes=saes, gate=gate)


def test_an_image_whose_output_is_nan_has_no_map(model, images, caplog):
    model.head.register_forward_hook(
        lambda module, args, out: out.index_put((torch.tensor(1), torch.tensor(4)), out.new_tensor(torch.nan))
    )
    for target in (None, 2, lambda logits: logits[:, 4]):
        caplog.clear()
        found = fastfg.attribute(model, images, target=target)
        assert found.maps.isfinite().flatten(1).all(1).tolist() == [True, False, True]
        assert [record.message for record in caplog.records] == [
            "no map for image(s) [1] of this batch, but NaN or infinity: the model's output is NaN"
        ]


def test_a_class_that_is_switched_off_is_no_error(model, images, caplog):
    model.head.register_forward_hook(lambda module, args, out: out.index_fill(1, torch.tensor([4]), -torch.inf))
    assert bool(fastfg.attribute(model, images).maps.isfinite().all())
    assert caplog.records == []


def test_numbers_that_become_too_large_are_said(images, caplog):
    model = tiny_vit().float()
    sae = random_sae(32, 100, "topk", k=9, dtype=torch.float32)
    sae.W_dec.mul_(1e30)
    sae.W_enc.mul_(1e30)
    found = fastfg.attribute(model, images.float(), saes={1: sae}, gate=fastfg.Gate((1,)))
    assert not bool(found.maps.isfinite().all())
    assert "no map for image(s) [0, 1, 2] of this batch, but NaN or infinity: numbers became too large" in caplog.text


def test_gates_of_the_last_block_that_can_only_be_1_are_said(model, images, saes, caplog):
    _warn_of_no_gradient.cache_clear()
    last = {3: saes[1]}
    fastfg.attribute(model, images, saes=last, gate=fastfg.Gate((3,), score="activation"))
    assert "all gates" not in caplog.text
    found = fastfg.attribute(model, images, saes=last, gate=fastfg.Gate((3,)))
    assert torch.all(found.gates[3] == 1)
    assert "all gates of block 3 are 1: it is the last one" in caplog.text


@pytest.mark.parametrize("options", [{"kappa": 1e30}, {"c_max": 1e300}])
def test_gates_beyond_float32_are_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected a number > ., at most 1e.06, got"):
        fastfg.Gate((1,), **options)


def test_a_wrapper_names_its_part(model, images):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.scale = model, torch.nn.Identity()

    with pytest.raises(TypeError, match="Wrapper \\(pass its part `backbone`\\)$"):
        fastfg.attribute(Wrapper(), images)
    with pytest.raises(TypeError, match="DataParallel \\(pass its part `module`\\)$"):
        fastfg.attribute(torch.nn.DataParallel(model), images)


def test_blocks_with_two_attentions_side_by_side():
    timm = fastfg.models.import_timm()
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    block = timm.models.vision_transformer.ParallelThingsBlock
    model = timm.models.vision_transformer.VisionTransformer(**shape, block_fn=block).eval()
    with pytest.raises(RuntimeError, match="expected one attention in block 0 of .*, met another one beside it"):
        fastfg.attribute(model, torch.randn(1, 3, 32, 32))
