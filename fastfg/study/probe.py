"""A linear head on a frozen backbone: fitted on features, and written into the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fit_head(model: Any, features: Tensor, labels: Tensor, weight_decay: float = 1e-2) -> None:
    """Fit ``model.head``, a linear layer, on features [n, d] and labels [n], and write it into the model.

    Minimises cross-entropy plus ``weight_decay`` times the squared weights, on standardised features. The weights
    that are written include the standardisation.
    """
    mean, std = features.mean(0), features.std(0).nan_to_num(1.0)
    std = torch.where(std > 0, std, 1.0)  # a feature that is constant says nothing
    x = (features - mean) / std
    head = nn.Linear(x.shape[1], model.head.out_features)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), labels) + weight_decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        model.head.weight.copy_(head.weight / std)
        model.head.bias.copy_(head.bias - head.weight @ (mean / std))


@torch.no_grad()
def features_of(model: Any, images: Tensor) -> Tensor:
    """What the head of a timm model reads: [B, d]."""
    return model.forward_head(model.forward_features(images), pre_logits=True)
