"""Builders that the tests of the metrics that explain again share."""

import torch
from torch import nn

import fastfg


class Linear(nn.Module):
    """Logits that are weighted sums of the 2 x 2 patches' means of images [B, 3, 4, 4]."""

    def __init__(self, weights):
        super().__init__()
        self.layer = nn.Linear(4, len(weights), bias=False)
        self.layer.weight.data = torch.tensor(weights, dtype=torch.float64)

    def forward(self, images):
        return self.layer(patch_means(images))


def patch_means(images):
    return nn.functional.avg_pool2d(images.mean(1, keepdim=True), images.shape[-1] // 2).flatten(1)


def contributions(model, images, target):
    """Weight times patch mean, for the target's class: the explanation of ``Linear``."""
    return (model.layer.weight[target] * patch_means(images)).detach().reshape(-1, 2, 2)


def vanilla(model, images, target):
    return fastfg.attribute(model, images, target=target).maps


def toy(weights=((1.0, 2.0, 3.0, 4.0), (4.0, 3.0, 2.0, 1.0)), n=3):
    images = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    model = Linear(weights)
    return model, images, contributions(model, images, torch.zeros(n, dtype=torch.long))
