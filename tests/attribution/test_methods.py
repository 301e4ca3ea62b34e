"""Methods without the model, integrated gradients, Grad-CAM, and maps from elsewhere."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastfg
from fastfg.attribution.choose_methods import OPTIONS
from fastfg.attribution.integrated_gradients import _starts, integrated_gradients
from fastfg.attribution.methods import grad_cam
from fastfg.attribution.priors import centre_map, edge_maps, random_maps
from fastfg.models import adapt
from fastfg.perturb import PatchGrid
from fastfg.targets import Target
from fastfg.types import METHODS
from tests.attribution.test_attribute import assert_unchanged, state_of
from tests.models.families import build
from tests.tools import record, tiny_vit

MODELS = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "mean of patches": {"global_pool": "avg"},
    "attention pooling": {"global_pool": "map", "class_token": False},
}


def per_patch(pixels, side=8):
    """Sums over patches, one patch at a time."""
    B, H, W = pixels.shape
    sums = [pixels[:, y : y + side, x : x + side].sum((1, 2)) for y in range(0, H, side) for x in range(0, W, side)]
    return torch.stack(sums, 1).reshape(B, H // side, W // side)


# Without the model -------------------------------------------------------------------------------------------------


def test_random_maps_depend_on_seed_key_and_name():
    grid = PatchGrid.of((32, 48), (4, 6))
    one = random_maps(["a", "b"], grid, 0, "random")
    assert one.shape == (2, 4, 6)
    assert ((one >= 0) & (one < 1)).all()
    assert len(one.unique()) == 48
    assert torch.equal(random_maps(["b"], grid, 0, "random")[0], one[1])
    for other in (random_maps(["a"], grid, 1, "random"), random_maps(["a"], grid, 0, "another")):
        assert not torch.equal(other[0], one[0])


def test_a_random_map_is_the_same_in_any_batch(model, images):
    methods = {"one": "random", "two": "random"}
    whole = fastfg.attribute(model, images, methods=methods, seed=3).methods
    alone = fastfg.attribute(model, images[1:2], methods=methods, seed=3).methods
    assert torch.equal(alone["one"][0], whole["one"][1])
    assert not torch.equal(whole["one"], whole["two"])
    named = [
        fastfg.attribute(model, images, methods=["random"], keys=keys).methods["random"] for keys in ("aab", "aba")
    ]
    assert torch.equal(named[0][0], named[0][1])
    assert torch.equal(named[0][1], named[1][2])
    with pytest.raises(ValueError, match="keys: expected 3 of them, one per image, got 2"):
        fastfg.attribute(model, images, methods=["random"], keys=["a", "b"])


def test_the_centre_by_hand():
    """4 x 2 patches: rows at -1.5, -0.5, 0.5, 1.5 with a standard deviation of 1; columns at -0.5, 0.5 with 0.5."""
    row, column = [math.exp(-0.5 * y**2) for y in (1.5, 0.5, 0.5, 1.5)], math.exp(-0.5)
    expected = torch.tensor([[y * column] * 2 for y in row], dtype=torch.float64)
    torch.testing.assert_close(centre_map(PatchGrid.of((8, 4), (4, 2))), expected)
    wide = centre_map(PatchGrid.of((8, 4), (4, 2)), width=1.0)
    assert float(wide.min()) > float(expected.min())
    for width in (0, -1, math.inf, True, "1"):
        with pytest.raises(ValueError, match="centre.width: expected a number > 0, got"):
            centre_map(PatchGrid.of((8, 4), (4, 2)), width=width)


def test_edges_by_hand():
    """A step of height 2 between columns 3 and 4: the Sobel response is 4 x 2 at both of them and 0 elsewhere."""
    image = torch.zeros(1, 1, 4, 8)
    image[..., 4:] = 2.0
    found = edge_maps(image, PatchGrid.of((4, 8), (2, 4)))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 4.0, 4.0, 0.0]] * 2], dtype=torch.float64))
    turned = edge_maps(image.mT, PatchGrid.of((8, 4), (4, 2)))
    torch.testing.assert_close(turned, found.mT)
    colour = torch.zeros(1, 3, 4, 8)
    colour[:, 1, :, 4:] = 2.0  # green
    weighted = edge_maps(colour, PatchGrid.of((4, 8), (2, 4)), pixel_std=(0.1, 0.5, 0.1))
    torch.testing.assert_close(weighted, found * 0.587 * 0.5, rtol=1e-6, atol=0)
    assert edge_maps(torch.ones(2, 3, 4, 8), PatchGrid.of((4, 8), (2, 4))).abs().max() < 1e-12


def test_edges_leave_out_pixels_beyond_the_last_patch():
    image = torch.zeros(1, 1, 5, 9)
    image[..., 8:] = 5.0
    grid = PatchGrid.of((5, 9), (2, 4), (2, 2))
    assert edge_maps(image, grid)[0, :, :3].eq(0).all()
    assert edge_maps(image, grid)[0, :, 3].eq(0.5 * 4 * 5).all()


# Integrated gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_integrated_gradients_are_captums(name):
    pytest.importorskip("captum")
    from captum.attr import IntegratedGradients

    model = tiny_vit(depth=2, **MODELS[name])
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    expected = IntegratedGradients(model).attribute(images, target=1, n_steps=20).sum(1)
    found = fastfg.attribute(
        model, images, target=1, methods=["integrated_gradients"], integrated_gradients={"steps": 20}
    ).methods["integrated_gradients"]
    expected = per_patch(expected.detach())
    assert (found - expected).abs().max() < 1e-7 * expected.abs().max()  # Captum's steps are float32


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur", "noise", 0.3])
def test_integrated_gradients_are_complete(baseline):
    """The sum of a map is f(image) - f(baseline)."""
    model = tiny_vit(depth=2, gain=2)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    adapter, grid, keys = adapt(model), PatchGrid.of((32, 48), (4, 6)), ["a", "b"]
    target = Target(1).of(torch.zeros(2, 5))
    found = integrated_gradients(adapter, images, target, grid, keys, steps=100, baseline=baseline)
    start = _starts(adapter, images, grid, keys, 0, baseline)
    with torch.no_grad():
        expected = (model(images) - model(start))[:, 1]
    torch.testing.assert_close(found.sum((1, 2)), expected, rtol=1e-5, atol=1e-7)


def test_integrated_gradients_of_a_linear_model_by_hand():
    """f = w . x: the map is w * (x - baseline), at any number of steps."""
    model = tiny_vit(depth=1)
    weight = torch.randn(3, 32, 48, dtype=torch.float64)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)

    class Linear(torch.nn.Module):
        def forward(self, x):
            return (x * weight).sum((1, 2, 3))[:, None]

    adapter = adapt(model)
    object.__setattr__(adapter, "forward", Linear())
    target = fastfg.targets.as_target(lambda output: output[:, 0])
    grid = PatchGrid.of((32, 48), (4, 6))
    for steps in (1, 7):
        found = integrated_gradients(adapter, images, target, grid, ["a", "b"], steps=steps, baseline=0.5)
        torch.testing.assert_close(found, per_patch(((images - 0.5) * weight).sum(1)))


def test_integrated_gradients_of_a_target(model, images):
    options = {"methods": ["integrated_gradients", "grad_cam"], "integrated_gradients": {"steps": 3}}
    plus, minus = (fastfg.attribute(model, images, target=c, **options).methods for c in (3, 1))
    both = fastfg.attribute(model, images, target=Target(3, minus=1), **options).methods
    name = "integrated_gradients"
    torch.testing.assert_close(both[name], plus[name] - minus[name], rtol=1e-8, atol=1e-10)
    own = fastfg.attribute(model, images, target=lambda output: output[:, 3], **options).methods
    for name in own:
        torch.testing.assert_close(own[name], plus[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "integrated_gradients.steps: expected an int >= 1, got 0"),
        ({"steps": True}, ValueError, "integrated_gradients.steps: expected an int >= 1, got True"),
        ({"baseline": "grey"}, ValueError, "baseline: expected one of .* got 'grey'"),
        ({"step": 3}, TypeError, r"integrated_gradients: expected options among .* got \['step'\]"),
        (3, TypeError, "integrated_gradients: expected a mapping of options, got int"),
    ],
)
def test_options_that_do_not_fit(model, images, options, error, message):
    with pytest.raises(error, match=message):
        fastfg.attribute(model, images, methods=["integrated_gradients"], integrated_gradients=options)


# Grad-CAM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_grad_cam_by_its_formula(name):
    """Weights of channels: mean gradient over the patches; map: the weighted sum of channels, above 0."""
    options = MODELS[name]
    model = tiny_vit(**options)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    block, prefix = (2 if name in ("class token", "registers") else 3), model.num_prefix_tokens
    _, target, _, _, x, g = record(model, images)
    expected = torch.zeros(2, 24, dtype=torch.float64)
    for i in range(2):
        weights = g[block][i, prefix:].mean(0)
        for t in range(24):
            expected[i, t] = max(float(weights @ x[block][i, prefix + t]), 0.0)
    assert (expected > 0).any()
    found = fastfg.attribute(model, images, target=target, methods=["grad_cam"]).methods["grad_cam"]
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=1e-12)


def test_grad_cam_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]]])
    g = torch.tensor([[[3.0, 0.0], [0.0, -3.0], [0.0, 0.0]]])  # weights 1 and -1
    assert grad_cam(x, g).tolist() == [[1.0, 0.0, 0.0]]


def test_the_block_of_grad_cam(model, images):
    """The head reads the class token alone: the patches of the last block do not matter to it."""
    gate = fastfg.Gate((1,), score="gradient_x_residual")
    found = fastfg.attribute(model, images, gate=gate, methods=["grad_cam"], grad_cam={"layer": 1})
    _, _, _, _, x, g = record(model, images)
    expected = grad_cam(x[1][:, 1:], g[1][:, 1:])
    torch.testing.assert_close(found.methods["grad_cam"].flatten(1), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.maps, fastfg.attribute(model, images, gate=gate).maps, rtol=0, atol=0)
    assert list(found.gates) == [1]
    with pytest.raises(ValueError, match="grad_cam.layer: expected at most 2, as the head does not read the patches"):
        fastfg.attribute(model, images, methods=["grad_cam"], grad_cam={"layer": 3})
    with pytest.raises(ValueError, match="grad_cam.layer: expected blocks from 0 to 3"):
        fastfg.attribute(model, images, methods=["grad_cam"], grad_cam={"layer": 4})
    with pytest.raises(ValueError, match="grad_cam: expected a model of at least two blocks"):
        fastfg.attribute(tiny_vit(depth=1), images, methods=["grad_cam"])


# All of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["timm DINOv3", "timm SigLIP", "transformers DINOv2", "open_clip zero-shot, attention pooling"]
)
def test_families(name):
    model, side = build(name), 64 if "DINOv3" in name or "timm SigLIP" in name else 32
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    options = {"methods": METHODS, "integrated_gradients": {"steps": 2}, "target": 1}
    found = fastfg.attribute(model, images, **options)
    assert list(found.methods) == list(METHODS)
    for method, maps in found.methods.items():
        assert maps.shape == found.maps.shape, method
        assert maps.dtype == torch.float64
        assert maps.isfinite().all()
        assert (maps.amax((1, 2)) > maps.amin((1, 2))).all(), method
    torch.testing.assert_close(found.maps, fastfg.attribute(model, images, target=1).maps, rtol=1e-9, atol=1e-14)


def test_inputs_are_unchanged(model, images):
    model.train()
    before, kept = state_of(model), images.clone()
    fastfg.attribute(model, images, methods=METHODS, integrated_gradients={"steps": 2})
    assert_unchanged(before, state_of(model))
    assert torch.equal(images, kept)
    assert images.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model, images, context):
    options = {"methods": METHODS, "integrated_gradients": {"steps": 2}}
    expected = fastfg.attribute(model, images, **options).methods
    with context():
        found = fastfg.attribute(model, images.clone(), **options).methods
    for name in METHODS:
        assert torch.equal(found[name], expected[name])


def test_low_precision(model, images):
    options = {"methods": METHODS, "integrated_gradients": {"steps": 2}, "target": 1}
    found = fastfg.attribute(model.bfloat16(), images.bfloat16(), **options).methods
    assert {maps.dtype for maps in found.values()} == {torch.float32}


def test_every_option_has_a_method():
    assert set(OPTIONS) <= set(METHODS)


# From elsewhere ----------------------------------------------------------------------------------------------------


def test_maps_from_elsewhere(model, images):
    given = torch.rand(3, 4, 6)
    given[0, 0, 0] = torch.nan
    seen = []

    def own(images, target):
        seen.append(target.tolist())
        images.zero_()  # its own copy
        target.zero_()
        return torch.full((3, 4, 6), 2.0, requires_grad=True)

    kept = images.clone()
    methods = {"tensor": given, "array": given.numpy(), "own": own, "again": "rollout"}
    found = fastfg.attribute(model, images, methods=methods, target=[1, 0, 2])
    assert list(found.methods) == list(methods)
    for name in ("tensor", "array"):
        torch.testing.assert_close(found.methods[name], given.double(), equal_nan=True)
    assert seen == [[1, 0, 2]]
    assert found.target.tolist() == [1, 0, 2]
    assert torch.equal(images, kept)
    assert found.methods["own"].eq(2).all()
    assert not found.methods["own"].requires_grad
    rollout = fastfg.attribute(model, images, methods=["rollout"]).methods["rollout"]
    assert torch.equal(found.methods["again"], rollout)
    found.methods["tensor"].zero_()
    assert given[1].sum() > 0
    empty = fastfg.attribute(model, images[:0], methods=methods).methods
    assert {name: tuple(maps.shape) for name, maps in empty.items()} == dict.fromkeys(methods, (0, 4, 6))
    assert len(seen) == 1


def test_a_captum_method_from_elsewhere(model, images):
    pytest.importorskip("captum")
    from captum.attr import InputXGradient

    def captum(images, target):
        return F.avg_pool2d(InputXGradient(model).attribute(images, target=target).sum(1), (8, 8))

    with torch.inference_mode():
        found = fastfg.attribute(model, images.clone(), methods={"captum": captum, "own": "gradient_x_input"}).methods
    torch.testing.assert_close(found["captum"] * 64, found["own"], rtol=1e-9, atol=1e-12)


def test_a_callable_gets_the_target_that_was_given(model, images):
    def target(output):
        return output[:, 2]

    def own(images, given):
        assert given is target
        return images[:, 0, ::8, ::8]

    fastfg.attribute(model, images, target=target, methods={"own": own})


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        (["lime"], ValueError, r"methods: expected names among .* got \['lime'\]"),
        (["random", "random"], ValueError, r"methods: expected each name once, got \['random', 'random'\]"),
        ([3], TypeError, r"methods: expected names, or {name: method}, got 3"),
        ({3: "random"}, TypeError, r"methods: expected names, or {name: method}, got 3"),
        ({"a": 3}, TypeError, r"methods\['a'\]: expected a name, a tensor \[B, gh, gw\] or a callable .* got int"),
        (
            {"a": torch.ones(3, 4, 6).long()},
            TypeError,
            r"methods\['a'\]: expected floating maps \[3, 4, 6\], got torch",
        ),
        ({"a": lambda images, target: None}, TypeError, r"methods\['a'\]: expected floating maps .* got NoneType"),
        ({"a": torch.ones(2, 4, 6)}, ValueError, r"methods\['a'\]: expected maps \[3, 4, 6\], got \[2, 4, 6\]$"),
        (
            {"a": torch.ones(3, 32, 48)},
            ValueError,
            r"got \[3, 32, 48\], one value per pixel: torch.nn.functional.avg_pool2d\(maps, \(8, 8\)\)",
        ),
        ({"a": torch.ones(3, 1, 32, 48)}, ValueError, r"avg_pool2d\(maps.sum\(1\), \(8, 8\)\) is one value per patch"),
    ],
)
def test_methods_that_do_not_fit(model, images, methods, error, message):
    with pytest.raises(error, match=message):
        fastfg.attribute(model, images, methods=methods)


def test_integrated_gradients_start_at_an_image(model, images):
    def starting_at(baseline):
        options = {"steps": 2, "baseline": baseline}
        found = fastfg.attribute(model, images, methods=["integrated_gradients"], integrated_gradients=options)
        return found.methods["integrated_gradients"]

    colours = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    whole = colours[:, :, None, None].expand_as(images)
    torch.testing.assert_close(starting_at(whole), starting_at(colours), rtol=1e-12, atol=0)
    assert not torch.equal(starting_at(whole.flip(0)), starting_at(whole))
    for wrong, got in ((whole[:2], r"\[2, 3, 32, 48\]"), (whole * torch.nan, "NaN or infinity")):
        with pytest.raises(ValueError, match=rf"integrated_gradients.baseline: expected finite images .* got {got}"):
            starting_at(wrong)
    with pytest.raises(ValueError, match="baseline: expected one of .* got 'removed'"):
        fastfg.attribute(model, images, methods=["integrated_gradients"], integrated_gradients={"baseline": "removed"})


def test_unknown_arguments_are_named(model, images):
    with pytest.raises(TypeError, match="attribute: unexpected argument 'gates'"):
        fastfg.attribute(model, images, gates=None)
    with pytest.raises(ValueError, match="centre: expected no options, as it is not among the methods, got some"):
        fastfg.attribute(model, images, centre={"width": 1.0})
