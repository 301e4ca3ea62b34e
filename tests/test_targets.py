"""``fastfg.Target``: what attribute differentiates and evaluate reads, compared with float64 formulas written out."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastfg
from fastfg.checks import check_target
from fastfg.models import adapt
from fastfg.targets import as_target
from tests.models.families import build
from tests.tools import oracle, tiny_vit

MAPS = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(4))
FLIP = {"metrics": ["pixel_flipping"], "pixel_flipping": {"patches_per_step": 8}}


def curve(model, images, target):
    """The readings of a short curve, and the outputs of the perturbed images that they belong to."""
    found = fastfg.evaluate(model, images, MAPS, target=target, **FLIP)
    assert found.errors == []
    order = MAPS.flatten(1).sort(dim=1, descending=True, stable=True).indices
    steps = []
    for removed in (0, 8, 16, 24):
        mask = torch.zeros(3, 24, dtype=torch.bool).scatter(1, order[:, :removed], True).reshape(3, 1, 4, 6)
        mask = mask.repeat_interleave(8, 2).repeat_interleave(8, 3)
        steps.append(torch.where(mask, images.mean((1, 2, 3), keepdim=True), images))
    with torch.no_grad():
        outputs = [model(step) for step in steps]
    return found.details["pixel_flipping"]["curve"], outputs


def columns(outputs, read):
    return torch.stack([read(output) for output in outputs], 1)


LINKS = {
    "softmax": (fastfg.Target(3), lambda z: z.softmax(1)[:, 3]),
    "sigmoid": (fastfg.Target(3, link="sigmoid"), lambda z: z[:, 3].sigmoid()),
    "no link": (fastfg.Target(3, link=None), lambda z: z[:, 3]),
    "contrast": (fastfg.Target(3, minus=1), lambda z: z[:, 3] - z[:, 1]),
    "contrast by softmax": (fastfg.Target(3, minus=1, link="softmax"), lambda z: z[:, [1, 3]].softmax(1)[:, 1]),
}


@pytest.mark.parametrize("link", LINKS)
def test_evaluate_reads_what_the_link_says(model, images, link):
    target, formula = LINKS[link]
    found, outputs = curve(model, images, target)
    torch.testing.assert_close(found, columns(outputs, formula), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        (fastfg.Target(3, link="sigmoid"), {3: 1.0}),
        (fastfg.Target(3, minus=1), {3: 1.0, 1: -1.0}),
        (fastfg.Target([3, 3, 3], minus=torch.tensor([1, 1, 1]), link="softmax"), {3: 1.0, 1: -1.0}),
    ],
)
def test_attribute_differentiates_the_logit(model, images, saes, gate, target, weights):
    single = tiny_vit(num_classes=1)
    single.load_state_dict(model.state_dict() | {"head.weight": torch.zeros(1, 32), "head.bias": torch.zeros(1)})
    with torch.no_grad():
        single.head.weight.copy_(sum(w * model.head.weight[c : c + 1] for c, w in weights.items()))
        single.head.bias.copy_(sum(w * model.head.bias[c : c + 1] for c, w in weights.items()))
    found = fastfg.attribute(model, images, saes=saes, gate=gate, target=target)
    expected = oracle(single, images, gate, saes, target=torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found.maps.flatten(1), expected, rtol=1e-8, atol=1e-12)
    assert found.target.classes.tolist() == [3, 3, 3]
    assert found.target.link in ("sigmoid", "softmax", None)


def test_the_largest_probability_of_a_multi_label_head(model, images):
    found = fastfg.evaluate(
        model, images, MAPS, target=fastfg.Target(3, link="sigmoid"), metrics=["saco"], saco={"impact": "max"}
    )
    assert found.errors == []
    with torch.no_grad():
        z = model(images)
    impact = found.details["saco"]["impact"]
    assert (z[:, 3].sigmoid()[:, None] - impact <= 1).all()
    assert not torch.equal(
        impact,
        fastfg.evaluate(model, images, MAPS, target=3, metrics=["saco"], saco={"impact": "max"}).details["saco"][
            "impact"
        ],
    )


@pytest.mark.parametrize("shape", ["one", "one per image"])
def test_similarity_to_an_embedding(images, shape):
    tower = tiny_vit(num_classes=0)
    random = torch.Generator().manual_seed(1)
    embedding = torch.randn(*((3, 32) if shape == "one per image" else (32,)), generator=random, dtype=torch.float64)
    target = fastfg.Target.similarity(embedding, scale=100.0)

    def formula(z):
        return 100 * F.cosine_similarity(z, embedding.expand(3, 32), dim=1)

    found, outputs = curve(tower, images, target)
    torch.testing.assert_close(found, columns(outputs, formula), rtol=1e-8, atol=1e-10)
    maps = fastfg.attribute(tower, images, target=target)
    expected = fastfg.attribute(tower, images, target=formula)
    torch.testing.assert_close(maps.maps, expected.maps, rtol=1e-8, atol=1e-12)
    assert maps.target is not target or shape == "one"
    texts = torch.cat([embedding.expand(3, 32)[:1], torch.randn(1, 32, generator=random, dtype=torch.float64)])
    zero_shot = fastfg.attribute(fastfg.models.ZeroShot(tower, texts), images[:1], target=0)  # the same logit
    torch.testing.assert_close(maps.maps[:1], zero_shot.maps, rtol=1e-8, atol=1e-12)


Named = namedtuple("Named", "extra scores")
FORMS = {
    "an object": (lambda z: SimpleNamespace(loss=None, logits=z), None, lambda o: o.logits),
    "a dict": (lambda z: {"logits": z, "more": z.sum()}, None, lambda o: o["logits"]),
    "a tuple": (lambda z: (z.sum(), z), lambda o: o[1], lambda o: o[1]),
    "a named tuple": (lambda z: Named([z], z), lambda o: o.scores, lambda o: o.scores),
}


@pytest.mark.parametrize("form", FORMS)
def test_models_that_return_objects(model, images, form):
    wrap, output, pick = FORMS[form]
    expected_maps = fastfg.attribute(model, images, target=3).maps
    expected = fastfg.evaluate(model, images, MAPS, target=3, **FLIP)
    value = fastfg.evaluate(model, images, MAPS, target=fastfg.Target(3, link=None), **FLIP)
    plain = model.forward
    model.forward = lambda x: wrap(plain(x))
    for target in (fastfg.Target(3, output=output), *([3] if output is None else [])):
        found = fastfg.attribute(model, images, target=target)
        assert torch.equal(found.maps, expected_maps)
        assert found.logits.shape == (3, 5)
        scores = fastfg.evaluate(model, images, MAPS, target=target, **FLIP)
        torch.testing.assert_close(scores["pixel_flipping"], expected["pixel_flipping"], rtol=1e-12, atol=0)
        assert scores.path == "tokens"
        alone = fastfg.evaluate(lambda x: model(x), images, MAPS, target=target, **FLIP)  # of no known family
        torch.testing.assert_close(alone["pixel_flipping"], expected["pixel_flipping"], rtol=1e-9, atol=0)

    def function(o):
        return pick(o)[:, 3]

    found = fastfg.attribute(model, images, target=function)  # for a function, the last block runs in full
    torch.testing.assert_close(found.maps, expected_maps, rtol=1e-12, atol=0)
    scores = fastfg.evaluate(model, images, MAPS, target=function, **FLIP)
    torch.testing.assert_close(scores["pixel_flipping"], value["pixel_flipping"], rtol=1e-9, atol=0)
    if output is not None:
        with pytest.raises(ValueError, match=r"expected floating logits \[3, n\].*fastfg.Target\(..., output=...\)"):
            fastfg.attribute(model, images, target=3)


def test_a_function_gets_the_models_own_output(images):
    pytest.importorskip("transformers")
    model = build("transformers ViT").double()
    images = images[..., :32]
    seen = []

    def function(outputs):
        seen.append(type(outputs).__name__)
        return outputs.logits[:, 3]

    found = fastfg.attribute(model, images, target=function)
    torch.testing.assert_close(found.maps, fastfg.attribute(model, images, target=3).maps, rtol=1e-12, atol=0)
    assert set(seen) == {"ImageClassifierOutput"}
    assert not found.logits.logits.requires_grad
    maps = torch.rand(3, 4, 4)
    scores = fastfg.evaluate(model, images, maps, target=function, **FLIP)
    expected = fastfg.evaluate(model, images, maps, target=fastfg.Target(3, link=None), **FLIP)
    torch.testing.assert_close(scores["pixel_flipping"], expected["pixel_flipping"], rtol=1e-9, atol=0)
    assert scores.path == expected.path == "tokens"


def test_a_function_may_read_tokens(images):
    """The tokens path then computes the last block for all of them."""
    pytest.importorskip("transformers")
    model = build("transformers ViT").double()
    images, maps = images[..., :32], torch.rand(3, 4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.config.output_hidden_states = True

    def patches(outputs):
        return outputs.hidden_states[-1][:, 1:].square().mean((1, 2))

    found = fastfg.evaluate(model, images, maps, target=patches, **FLIP)
    assert found.path == "tokens"
    expected = fastfg.evaluate(lambda x: model(x), images, maps, target=patches, **FLIP)
    torch.testing.assert_close(found["pixel_flipping"], expected["pixel_flipping"], rtol=1e-9, atol=0)


def test_targets_per_image_over_batches(model, images):
    gates = {"vanilla": None}
    target = fastfg.Target([0, 1, 2], minus=[3, 3, 4])
    table = fastfg.compare(model, [images[:2], images[2:]], gates=gates, target=target, metrics=["saco"])
    for i in range(3):
        maps = fastfg.attribute(model, images[i : i + 1], target=target[[i]]).maps
        one = fastfg.evaluate(model, images[i : i + 1], maps, target=target[[i]], metrics=["saco"])
        assert table["saco"][i] == pytest.approx(float(one["saco"]), rel=1e-9)
    assert table["target"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="target: expected 3 of them, one per image, got 4"):
        fastfg.compare(model, images, gates=gates, target=fastfg.Target([0, 1, 2, 3]), metrics=["saco"])
    tower, embeddings = tiny_vit(num_classes=0), torch.randn(3, 32, dtype=torch.float64)
    table = fastfg.compare(
        tower, [images[:1], images[1:]], gates=gates, target=fastfg.Target.similarity(embeddings), metrics=["saco"]
    )
    assert table["target"].isna().all()
    assert table["saco"].notna().all()


def test_no_images(model, images):
    for target in (fastfg.Target([]), fastfg.Target(3, minus=1), fastfg.Target.similarity(torch.ones(0, 5))):
        assert fastfg.attribute(model, images[:0], target=target).maps.shape == (0, 4, 6)
        assert len(fastfg.evaluate(model, images[:0], MAPS[:0], target=target)["saco"]) == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: fastfg.Target(3, link="logit"),
            ValueError,
            "link: expected 'auto', 'softmax', 'sigmoid' or None, got",
        ),
        (lambda: fastfg.Target(3, minus=1, link="sigmoid"), ValueError, "link: expected 'auto', 'softmax' or None for"),
        (lambda: fastfg.Target(minus=1), ValueError, "minus: expected None without a class to subtract from"),
        (lambda: fastfg.Target(0.5), TypeError, "target: expected integers"),
        (lambda: fastfg.Target(1, minus="cat"), TypeError, "minus: expected an int"),
        (lambda: fastfg.Target(1, output="logits"), TypeError, "output: expected a function"),
        (
            lambda: fastfg.Target.similarity([1.0]),
            ValueError,
            r"embedding: expected a floating tensor \[D\] or \[B, D\]",
        ),
        (
            lambda: fastfg.Target.similarity(torch.zeros(4)),
            ValueError,
            "embedding: expected finite vectors that are not",
        ),
        (lambda: fastfg.Target.similarity(torch.ones(4), scale=0), ValueError, "scale: expected a number > 0, got 0"),
    ],
)
def test_targets_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (fastfg.Target(3, minus=3), "minus: expected another class than the target's"),
        (fastfg.Target(3, minus=7), "minus: expected classes from 0 to 4, got"),
        (fastfg.Target([1, 2]), r"target: expected one class, or one per image \(3\), got \[2\]"),
        (fastfg.Target.similarity(torch.ones(7)), "embedding: expected width 5, as the model's embedding, got 7"),
        (fastfg.Target.similarity(torch.ones(2, 5)), r"embedding: expected one per image \(3\), got \[2, 5\]"),
    ],
)
def test_targets_that_do_not_fit_the_model(model, images, target, message):
    with pytest.raises(ValueError, match=message):
        fastfg.attribute(model, images, target=target)
    with pytest.raises(ValueError, match=message):
        fastfg.evaluate(model, images, MAPS, target=target)


def test_one_logit(images):
    model = tiny_vit(num_classes=1)
    found, outputs = curve(model, images, fastfg.Target(0))
    torch.testing.assert_close(found, columns(outputs, lambda z: 1 - z[:, 0].sigmoid()), rtol=1e-8, atol=1e-12)
    found, outputs = curve(model, images, fastfg.Target(0, link=None))
    torch.testing.assert_close(found, columns(outputs, lambda z: -z[:, 0]), rtol=1e-8, atol=1e-12)
    for target, message in [
        (fastfg.Target(1, link="softmax"), "link: expected 'auto', 'sigmoid' or None for a model with one logit"),
        (fastfg.Target(1, minus=0), "minus: expected None for a model with one logit"),
    ]:
        with pytest.raises(ValueError, match=message):
            fastfg.attribute(model, images, target=target)


def test_impact_max_needs_probabilities(model, images):
    for target in (fastfg.Target(3, minus=1), fastfg.Target(3, link=None), fastfg.Target.similarity(torch.ones(5))):
        with pytest.raises(ValueError, match="saco: expected impact='target' for a target without probabilities"):
            fastfg.evaluate(model, images, MAPS, target=target, saco={"impact": "max"})


def test_a_function_of_other_rows_is_refused_for_one_image_too(model, images):
    with pytest.raises(ValueError, match="target: expected a function of each row of the output alone"):
        fastfg.evaluate(model, images[:1], MAPS[:1], target=lambda o: o[:, 2] - o[:, 2].mean(), **FLIP)
    fine = fastfg.evaluate(model, images[:1], MAPS[:1], target=lambda o: o[:, 2] - o.mean(1), **FLIP)
    assert fine.errors == []


def test_only_functions_of_the_users_own_may_read_patches(model, images):
    """For all other targets the last block computes only what the head reads."""
    assert not check_target(adapt(model), fastfg.Target(1)).may_read_patches
    assert not check_target(None, fastfg.Target(1)).may_read_patches
    assert check_target(adapt(model), fastfg.Target(1, output=lambda o: o)).may_read_patches
    assert check_target(adapt(model), as_target(lambda o: o[:, 1])).may_read_patches


SURE = {
    "softmax": lambda z: z.softmax(1)[:, 2],
    "log softmax": lambda z: z.log_softmax(1)[:, 2],
    "sigmoid": lambda z: z[:, 2].sigmoid(),
    "in an object": lambda z: z.logits.softmax(-1)[:, 2],
    "similarity": fastfg.Target.similarity(torch.linspace(1, 2, 5)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SURE)
def test_a_probability_near_one_of_a_model_in_half_precision(model, images, name, dtype):
    """0.99999 is 1 in half precision, where the gradient was noise: the map differed by half of its largest value."""
    target = SURE[name]
    if name == "in an object":
        model.register_forward_hook(lambda *given: SimpleNamespace(logits=given[2]))
    with torch.no_grad():
        model.head.bias[2] += 10
    expected = fastfg.attribute(model, images, target=target).maps
    found = fastfg.attribute(model.to(dtype), images.to(dtype), target=target).maps
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_readings_of_a_model_in_half_precision_are_those_of_its_logits(model, images, dtype):
    with torch.no_grad():
        model.head.bias[2] += 10
        logits = model.to(dtype)(images.to(dtype))
    expected = logits.double().softmax(1)[:, 2]
    target = fastfg.targets.as_target(SURE["softmax"])
    for value in (target.value(logits, 3), target.read(logits, 3)[1], fastfg.targets.probabilities(logits)[:, 2]):
        assert value.dtype != dtype
        torch.testing.assert_close(1 - value.double(), 1 - expected, rtol=0.01, atol=1e-7)
    found = fastfg.evaluate(model, images.to(dtype), MAPS, target=SURE["softmax"], **FLIP)
    probabilities = found.details["pixel_flipping"]["curve"][:, 0]
    torch.testing.assert_close(1 - probabilities.cpu(), 1 - expected, rtol=0.01, atol=1e-7)


def test_a_gradient_that_float16_can_not_hold(model, images):
    """1e-6 at the output: the backward pass starts from a multiple of it."""
    options = {"target": SURE["softmax"], "methods": ["integrated_gradients"], "integrated_gradients": {"steps": 2}}
    with torch.no_grad():
        model.head.bias[2] += 14
    expected = fastfg.attribute(model, images, **options)
    found = fastfg.attribute(model.half(), images.half(), **options)
    for maps, exact in ((found.maps, expected.maps), (found.methods, expected.methods)):
        maps, exact = (one if isinstance(one, torch.Tensor) else one["integrated_gradients"] for one in (maps, exact))
        assert float((maps.double() - exact).abs().max() / exact.abs().max()) < 0.05


def test_a_function_with_a_matrix_in_half_precision_is_told(model, images):
    matrix = torch.randn(5, 2).half()
    with pytest.raises(RuntimeError, match="^target: expected a function of float32, which it gets in place of half"):
        fastfg.attribute(model.half(), images.half(), target=lambda logits: (logits @ matrix)[:, 0])
