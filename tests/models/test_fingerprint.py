"""A model is told by its weights."""

import copy

import torch
from torch import nn

from fastfg.models.fingerprint import fingerprint


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
