"""Holding a model still: nested holders, shared parts, threads, compiled parts, weights made in inference mode."""

import threading
from contextlib import ExitStack

import pytest
import torch

from fastfg.models import hold as holding
from fastfg.models.hold import hold


def kept():
    return dict(holding.__dict__["_held"])


def test_nested_holders_restore_once_at_the_end():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].flag = "old"
    with hold(model, [(model[0], "flag", "new")]):
        with hold(model):
            assert not model.training
        assert not model[1].training
        assert not model[0].weight.requires_grad
        assert model[0].flag == "new"
    assert model.training
    assert model[1].training
    assert model[0].weight.requires_grad
    assert model[0].flag == "old"


def test_restored_after_an_exception():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), hold(model):
        raise KeyError
    assert model.training
    assert model.weight.requires_grad


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_two_models_that_share_a_part(first_to_leave):
    tower = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    tower[0].bias.requires_grad_(False)
    models = [torch.nn.Sequential(tower), torch.nn.Sequential(tower, torch.nn.Linear(2, 2))]
    holders = [ExitStack(), ExitStack()]
    for holder, model in zip(holders, models, strict=True):
        holder.enter_context(hold(model))
    holders[first_to_leave].close()
    assert models[first_to_leave].training
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    holders[1 - first_to_leave].close()
    assert all(module.training for model in models for module in model.modules())
    assert [parameter.requires_grad for parameter in tower.parameters()] == [True, False]


def test_readers_that_want_different_flags_are_refused():
    model = torch.nn.Linear(2, 2)
    model.flag = "old"
    with hold(model, [(model, "flag", "a")]):
        message = "flag: expected 'b' while .* reader of the same Linear holds it at 'a'"
        with pytest.raises(RuntimeError, match=message), hold(model, [(model, "flag", "b")]):
            pass
        assert model.flag == "a"
        assert not model.training
    assert model.flag == "old"
    assert model.training


def test_a_model_is_not_kept_alive_afterwards():
    model, before = torch.nn.Linear(2, 2), kept()
    with hold(model):
        assert kept().keys() > before.keys()
    assert kept().keys() == before.keys()


def test_weights_made_in_inference_mode_are_restored():
    with torch.inference_mode():
        model = torch.nn.Linear(2, 2)
    with hold(model):
        assert not model.weight.requires_grad
    assert model.weight.requires_grad
    assert model.training


def stance():
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


def test_threads_with_compiled_models_leave_the_stance_as_it_was():
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    for model in models:
        model.compile(backend="eager")
    before, both, left = stance(), threading.Barrier(2), threading.Event()
    inside = []

    def second():
        with hold(models[1]):
            both.wait()
            left.wait()
            inside.append(stance())

    thread = threading.Thread(target=second)
    with hold(models[0]):
        thread.start()
        both.wait()
        assert stance() == "force_eager"
    left.set()
    thread.join()
    assert inside == ["force_eager"]
    assert stance() == before
