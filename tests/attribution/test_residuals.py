"""Residuals: a forward pass ends after the last block that is asked for, and nothing else changes."""

import threading

import pytest
import torch

import fastfg
from fastfg.models import adapt
from tests.attribution.test_blocks_met import run_blocks
from tests.models.families import FAMILIES, HYBRIDS
from tests.models.test_families import setup


@pytest.mark.parametrize("name", FAMILIES | HYBRIDS)
def test_later_blocks_do_not_run_and_the_numbers_are_the_same(name):
    model, _, images = setup(name)
    adapter, ran = adapt(model), []
    every = list(range(len(adapter.blocks)))
    whole, first = (fastfg.residuals(model, images, blocks) for blocks in (every, [0]))
    adapter.model.train()
    before = held(adapter.model)
    for number, block in enumerate(adapter.blocks):
        block.forward = noting(block.forward, ran, number)
    fastfg.residuals(model, images, [0])
    assert ran == every  # in full, as the model runs other functions than before
    ran.clear()
    again = fastfg.residuals(model, images, [0])
    assert ran == [0]
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[0], whole[0])
    assert list(fastfg.residuals(model, images, every[::-1])) == every
    assert ran == [0, *every]
    assert held(adapter.model) == before


def held(model):
    """What a reader changes: the modes, the gradients and the hooks."""
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()]


def noting(forward, ran, number):
    def noted(*given, **options):
        ran.append(number)
        return forward(*given, **options)

    return noted


def test_a_users_own_hooks_all_run(model, images):
    expected, called = fastfg.residuals(model, images, [1]), []
    with model.norm.register_forward_hook(lambda *_: called.append("norm")):
        found = fastfg.residuals(model, images, [1])
    assert called == ["norm"]
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("of", ["the model", "a block", "its forward"])
def test_compiled_models(model, images, of):
    expected = fastfg.residuals(model, images, [1])[1]
    if of == "a block":
        model.blocks[1].compile(backend="eager")
    elif of == "its forward":
        model.compile(backend="eager")
    read = torch.compile(model, backend="eager") if of == "the model" else model
    assert all(torch.equal(fastfg.residuals(read, images, [1])[1], expected) for _ in range(2))
    torch.testing.assert_close(read(images), read(images))


def test_autocast_and_checkpointing(model, images):
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = fastfg.residuals(model, images, [1])[1]
        assert torch.equal(fastfg.residuals(model, images, [1])[1], expected)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.equal(fastfg.residuals(model, images, [1])[1], expected)
    plain = fastfg.residuals(model, images, [1])[1]
    model.grad_checkpointing = True
    assert torch.equal(fastfg.residuals(model, images, [1])[1], plain)


def test_a_model_that_catches_errors_goes_on(model, images):
    def caught(blocks, x):
        for block in blocks:
            try:
                y = block(x)
            except Exception:
                y = block.forward(x)
            x = y
        return x

    expected = fastfg.residuals(model, images, [1])[1]
    run_blocks(model, caught)
    assert all(torch.equal(fastfg.residuals(model, images, [1])[1], expected) for _ in range(2))


def test_other_threads_run_the_model_to_its_end(model, images):
    expected = model(images)
    fastfg.residuals(model, images, [1])
    found, inside = [], threading.Event()

    def other():
        inside.wait(10)
        found.extend(model(images) for _ in range(3))

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(20):
        fastfg.residuals(model, images, [1])
        inside.set()
    thread.join()
    assert all(torch.equal(one, expected) for one in found)
    assert len(found) == 3


def test_a_model_that_is_changed_runs_in_full_again(model, images):
    fastfg.residuals(model, images, [1])

    def twice(blocks, x):
        for block in [*blocks, blocks[1]]:
            x = block(x)
        return x

    run_blocks(model, twice)
    with pytest.raises(RuntimeError, match="once"):
        fastfg.residuals(model, images, [1])


def test_a_model_whose_own_method_changes_runs_in_full_again(model, images):
    fastfg.residuals(model, images, [1])
    features = model.forward_features

    def again(images, **options):
        features(images, **options)
        return features(images, **options)

    model.forward_features = again
    with pytest.raises(RuntimeError, match="once"):
        fastfg.residuals(model, images, [1])
