"""Targets of ``attribute``: a class, one of the two classes of a single logit, or a function of the model's output."""

import copy
from types import SimpleNamespace

import pytest
import torch

import fastfg
from tests.attribution.test_attribute import same
from tests.tools import oracle, tiny_vit


def with_head(model, weight, bias):
    """A copy of ``model`` with a head of one logit."""
    model = copy.deepcopy(model)
    model.head = torch.nn.Linear(32, 1).double()
    model.head.weight.data, model.head.bias.data = weight.detach().clone(), bias.detach().clone()
    return model


def test_a_single_logit_is_a_sigmoid(images, saes, gate):
    model = tiny_vit(num_classes=1)
    negative = with_head(model, -model.head.weight, -model.head.bias)
    index = torch.zeros(3, dtype=torch.int64)
    options = {"saes": saes, "gate": gate}
    one = fastfg.attribute(model, images, target=1, **options)
    zero = fastfg.attribute(model, images, target=[0, 0, 0], **options)
    same(one.maps, oracle(model, images, gate, saes, target=index))
    same(zero.maps, oracle(negative, images, gate, saes, target=index))
    assert one.target.tolist() == [1, 1, 1]
    assert one.logits.shape == (3, 1)
    free = fastfg.attribute(model, images, **options)
    assert torch.equal(free.target, (free.logits[:, 0] > 0).long())
    for i, predicted in enumerate(free.target):
        torch.testing.assert_close(free.maps[i], (one if predicted else zero).maps[i], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="target: expected classes from 0 to 1, got \\[2\\]"):
        fastfg.attribute(model, images, target=2)


def test_a_target_is_one_number_per_image(model, images):
    given = torch.tensor([1, 0, 4])
    for target in (3, [3, 1, 2], given, None):
        found = fastfg.attribute(model, images, target=target).target
        assert found.shape == (3,)
        assert found.dtype == torch.int64
        found[0] = 9  # its own memory
        assert (found[1:] != 9).all()
    assert given.tolist() == [1, 0, 4]


def test_a_function_of_the_logits(model, images, saes, gate):
    def difference(logits):
        return logits[:, 3] - logits[:, 1]

    found = fastfg.attribute(model, images, saes=saes, gate=gate, target=difference)
    head = model.head
    single = with_head(model, head.weight[3:4] - head.weight[1:2], head.bias[3:4] - head.bias[1:2])
    same(found.maps, oracle(single, images, gate, saes, target=torch.zeros(3, dtype=torch.int64)))
    assert found.target is difference
    torch.testing.assert_close(found.logits, model(images).detach())
    assert not found.logits.requires_grad


def test_a_function_that_writes_into_the_logits(model, images):
    def scaled(logits):
        logits[:, 1] *= 100
        return logits[:, 1]

    expected = fastfg.attribute(model, images, target=lambda logits: 100 * logits[:, 1])
    found = fastfg.attribute(model, images, target=scaled)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-12, atol=0)


def test_a_function_of_another_output(model, images):
    expected = fastfg.attribute(model, images, target=2).maps
    plain = model.forward
    model.forward = lambda x: SimpleNamespace(scores=plain(x))
    found = fastfg.attribute(model, images, target=lambda output: output.scores[:, 2])
    torch.testing.assert_close(found.maps, expected, rtol=1e-12, atol=0)  # for a function, the last block runs in full
    assert found.logits.scores.shape == (3, 5)
    with pytest.raises(
        ValueError, match=r"model: expected floating logits \[3, n\] from model\(images\), got SimpleNamespace"
    ):
        fastfg.attribute(model, images)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (lambda logits: logits, ValueError, r"one value per image, \[3\], got torch.float64 \[3, 5\]"),
        (lambda logits: logits.argmax(1), ValueError, r"one value per image, \[3\], got torch.int64 \[3\]"),
        (lambda logits: 1.0, ValueError, r"one value per image, \[3\], got float"),
        (lambda logits: logits.detach()[:, 0], RuntimeError, "expected the target to depend on the attention of every"),
    ],
)
def test_functions_that_do_not_fit(model, images, target, error, message):
    with pytest.raises(error, match=message):
        fastfg.attribute(model, images, target=target)


@pytest.mark.parametrize(
    "target",
    [
        lambda logits: logits[:, 1] - logits[:, 1].mean(),
        lambda logits: logits[:, 1] / logits[:, 1].norm(),
        lambda logits: logits.flip(0)[:, 1],
        lambda logits: logits[0, :3],  # one image's classes as the values of three
        lambda logits: logits[:, :3].mean(0),
        lambda logits: logits[:, :3].softmax(0)[0],
    ],
)
def test_a_function_that_reads_the_rows_of_other_images(model, images, target):
    with pytest.raises(ValueError, match="^target: expected a function of each row of the output alone"):
        fastfg.attribute(model, images, target=target)


def test_a_function_may_hold_values_of_its_own_per_image(model, images):
    labels = torch.tensor([3, 0, 2])
    found = fastfg.attribute(model, images, target=lambda logits: logits.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(found.maps, fastfg.attribute(model, images, target=labels).maps)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize(
    "target",
    [
        lambda o: o.softmax(1).amax(1),
        lambda o: o.amax(1) - o.logsumexp(1),
        lambda o: o.double().softmax(1)[:, 0] * 1e-6,
    ],
)
def test_probabilities_of_a_sure_model_are_of_each_row_alone(n, target):
    model = tiny_vit(torch.float32)
    with torch.no_grad():
        model.head.weight.mul_(50)
    images = torch.randn(n, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert fastfg.attribute(model, images, target=target).maps.shape == (n, 4, 6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_prototypes_and_transposed_outputs_are_accepted(model, n):
    """Whether a function is accepted does not depend on the number of images."""
    images = torch.randn(n, 3, 32, 48, dtype=torch.float64)
    prototypes = torch.randn(3, 5, dtype=torch.float64)
    forward = model.forward
    outputs = (
        (lambda o: {"logits": o, "text": prototypes}, lambda o: (o["logits"] @ o["text"].T)[:, 0]),
        (lambda o: (o.mT[:n],), lambda o: o[0][0]),
        (lambda o: {"crops": torch.cat([o, 2 * o])[:, :n]}, lambda o: o["crops"].unflatten(0, (2, n)).mean(0)[:, 0]),
        (lambda o: list(o), lambda o: torch.stack([row[0] for row in o])),
        (lambda o: {"flat": o.flatten()}, lambda o: o["flat"].unflatten(0, (n, -1))[:, 1]),
    )
    for made, target in outputs:
        model.forward = lambda images, made=made: made(forward(images))
        assert fastfg.attribute(model, images, target=target).maps.shape == (n, 4, 6)


def test_rows_of_other_images_in_any_layout_are_refused(model, images):
    forward = model.forward
    outputs = (
        (lambda o: list(o), lambda o: torch.stack([o[0][0] for _ in o])),
        (lambda o: {"flat": o.flatten()}, lambda o: o["flat"].unflatten(0, (5, -1))[0]),
    )
    for made, target in outputs:
        model.forward = lambda images, made=made: made(forward(images))
        with pytest.raises(ValueError, match="^target: expected a function of each row of the output alone"):
            fastfg.attribute(model, images, target=target)
