"""A linear head on a frozen backbone: fitted on features, and written into the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Accuracy(NamedTuple):
    """On images that were not trained on: ``overall``, ``balanced`` (the mean over classes), and ``majority``, the
    accuracy of always naming the most frequent class."""

    overall: float
    balanced: float
    majority: float
    per_class: list[float]
    images: int

    def describe(self) -> str:
        """In one line."""
        return (
            f"accuracy {self.overall:.1%} on {self.images} images (always the most frequent class: "
            f"{self.majority:.1%}), balanced {self.balanced:.1%}"
        )


def fit_head(model: Any, features: Tensor, labels: Tensor, weight_decay: float = 1e-2) -> None:
    """Fit ``model.head``, a linear layer, on features [n, d] and labels [n], and write it into the model.

    Minimises cross-entropy plus ``weight_decay`` times the squared weights, on standardised features. The weights
    that are written include the standardisation.
    """
    mean, std = features.mean(0), features.std(0)
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


def accuracy(predicted: Sequence[int] | Tensor, labels: Sequence[int] | Tensor, n_classes: int) -> Accuracy:
    """The :class:`Accuracy` of predicted classes. The accuracy of a class without images is NaN, and not counted."""
    predicted, labels = torch.as_tensor(predicted), torch.as_tensor(labels)
    right = (predicted == labels).double()
    shares = [right[labels == c].mean().item() if bool((labels == c).any()) else float("nan") for c in range(n_classes)]
    known = [share for share in shares if share == share]
    majority = torch.bincount(labels, minlength=n_classes).max().item() / len(labels)
    return Accuracy(right.mean().item(), sum(known) / len(known), majority, shares, len(labels))
