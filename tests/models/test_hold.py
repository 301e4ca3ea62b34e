"""Holding a model still, nested and with odd parts."""

import pytest
import torch

from fastfg.models.hold import _held, hold


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
    assert model not in _held


def test_restored_after_an_exception():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), hold(model):
        raise KeyError
    assert model.training
    assert model.weight.requires_grad
