"""A model is told by its weights."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastfg import residuals
from fastfg.models import adapt
from fastfg.models.fingerprint import fingerprint, fingerprints
from tests.models.families import FAMILIES, HYBRIDS
from tests.models.test_families import setup

PREFIX = ("cls_token", "class_token", "reg_token", "class_embedding", "dist_token")


def test_every_weight_and_buffer_counts():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    own = fingerprint(module)
    assert fingerprint(copy.deepcopy(module)) == own
    for name in module.state_dict():
        other = copy.deepcopy(module)
        other.state_dict()[name].add_(1)
        assert fingerprint(other) != own, name
    assert fingerprint(module.double()) != own


@pytest.mark.parametrize("name", FAMILIES | HYBRIDS)
def test_all_that_the_first_block_depends_on_counts_and_no_head(name):
    model, _, images = setup(name)
    adapter = adapt(model)
    before, stream = fingerprints(adapter, [0, 1]), residuals(model, images, 0)[0]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    inside = {id(tensor) for block in adapter.blocks for tensor in block.parameters()}
    outside = [(own, tensor) for own, tensor in model.named_parameters() if id(tensor) not in inside and tensor.numel()]
    seen = set()
    for own, tensor in [*outside[:: len(outside) // 12 + 1], outside[-1]]:
        kept = tensor.detach().clone()
        tensor.data.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype))
        matters = not torch.equal(residuals(model, images, 0)[0], stream)
        found = fingerprints(adapter, [0, 1])
        tensor.data.copy_(kept)
        if matters:
            assert all(found[block] != before[block] for block in before), own
        elif not any(word in own for word in PREFIX):  # of the class token alone, which the patches read later
            assert found == before, own
        seen.add(matters)
    assert seen == {True, False}
    assert fingerprints(adapter, [0, 1]) == before
    assert all(parameter.requires_grad == was for parameter, was in asked)
    assert torch.equal(residuals(model, images, 0)[0], stream)


def test_a_model_in_another_one_is_the_same():
    model, _, _ = setup("timm ViT")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes, self.body = nn.Parameter(torch.ones(3, dtype=torch.float64)), model

        def forward(self, images):
            return self.body(images)

    outer, adapter = Wrapped(), adapt(model)
    other = dataclasses.replace(adapter, model=outer, forward=outer)
    assert fingerprints(other, [1]) == fingerprints(adapter, [1])


def test_a_model_whose_size_is_not_found_counts_all_that_is_outside(model):
    adapter = dataclasses.replace(adapt(model), grid=unknown)
    own = fingerprints(adapter, [0])
    model.head.bias.data.add_(1)
    assert fingerprints(adapter, [0]) != own


def unknown(size):
    raise ValueError("images: expected another size")


def test_threads_share_a_model():
    model, _, _ = setup("timm ViT")
    adapter = adapt(model)
    own = fingerprints(adapter, [1])
    with ThreadPoolExecutor(4) as pool:
        assert all(found == own for found in pool.map(lambda _: fingerprints(adapter, [1]), range(12)))
    assert all(parameter.requires_grad for parameter in model.parameters())


class Prompted(nn.Module):
    """A ViT that adds a prompt before each block, and whose last block holds the first prompt too."""

    def __init__(self, model):
        super().__init__()
        self.body, self.deep = model, nn.ParameterList([torch.randn(1, dtype=torch.float64) for _ in range(2)])
        self.body.blocks[1].first = self.deep[0]

    def forward(self, images):
        handles = [
            block.register_forward_pre_hook(lambda _, given, own=prompt: (given[0] + own, *given[1:]))
            for block, prompt in zip(self.body.blocks, self.deep, strict=False)
        ]
        try:
            return self.body(images)
        finally:
            for handle in handles:
                handle.remove()


def test_weights_that_are_used_between_blocks_count():
    model, _, images = setup("timm ViT")
    outer, adapter = Prompted(model), adapt(model)
    adapter = dataclasses.replace(adapter, model=outer, forward=outer)
    before, whole = fingerprints(adapter, [0, 1]), residuals(adapter, images, [0, 1])
    for number, changed in ((0, [0, 1]), (1, [1])):
        kept = outer.deep[number].data.clone()
        outer.deep[number].data.add_(1)
        found, now = fingerprints(adapter, [0, 1]), residuals(adapter, images, [0, 1])
        assert [block for block in before if found[block] != before[block]] == changed
        assert [block for block in before if not torch.equal(now[block], whole[block])] == changed
        outer.deep[number].data.copy_(kept)
    assert fingerprints(adapter, [0, 1]) == before
    assert fingerprints(adapter, [1]) == {1: before[1]}


def test_a_buffer_that_is_not_saved_counts_where_it_is_used():
    model, _, images = setup("timm ViT")
    adapter, plain = adapt(model), model.blocks[1].forward
    for name in ("factor", "unused"):
        model.blocks[1].register_buffer(name, torch.ones(48, dtype=torch.float64), persistent=False)
    model.blocks[1].forward = lambda x, **options: plain(x, **options) * model.blocks[1].factor
    before, whole = fingerprints(adapter, [0, 1]), residuals(model, images, [0, 1])
    model.blocks[1].unused.add_(1)
    assert fingerprints(adapter, [0, 1]) == before
    model.blocks[1].factor.add_(1)
    found, now = fingerprints(adapter, [0, 1]), residuals(model, images, [0, 1])
    assert [block for block in before if found[block] != before[block]] == [1]
    assert [block for block in before if not torch.equal(now[block], whole[block])] == [1]


@pytest.mark.parametrize("place", ["the model", "a block"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_counter_of_calls_does_not_count(place, how, persistent):
    model, _, images = setup("timm ViT")
    adapter, there = adapt(model), model if place == "the model" else model.blocks[0]
    there.register_buffer("calls", torch.tensor(0), persistent=persistent)
    there.register_buffer("zero_point", torch.tensor(0), persistent=True)

    def count(*_):
        there.calls = there.calls.add_(1) if how == "in place" else there.calls + 1

    there.register_forward_pre_hook(count)
    before = fingerprints(adapter, [0, 1])
    residuals(model, images, [0, 1])
    assert int(there.calls) > 1
    assert fingerprints(adapter, [0, 1]) == before
    if place == "a block":  # a whole number that stays is a weight
        there.zero_point.add_(1)
        assert fingerprints(adapter, [0, 1])[0] != before[0]


def test_a_cache_that_the_forward_pass_fills_keeps_the_fingerprint():
    model, _, images = setup("timm ViT")
    adapter, plain = adapt(model), model.blocks[1].forward
    model.blocks[1].register_buffer("table", torch.zeros(1, dtype=torch.float64), persistent=False)

    def forward(x, **options):
        if len(model.blocks[1].table) != x.shape[1]:
            model.blocks[1].table = torch.arange(x.shape[1], dtype=torch.float64)
        return plain(x, **options) + model.blocks[1].table[:, None]

    model.blocks[1].forward = forward
    before = fingerprints(adapter, [0, 1])
    residuals(model, images, [0, 1])
    assert fingerprints(adapter, [0, 1]) == before
    model.blocks[1].table = model.blocks[1].table[:3]
    assert fingerprints(adapter, [0, 1]) == before
