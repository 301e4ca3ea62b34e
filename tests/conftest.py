"""Shared fixtures: tiny ViTs, random SAEs, and MNIST digits with a ViT trained on them."""

from __future__ import annotations

import hashlib
import inspect

import pytest
import torch

import fastfg
from fastfg.models.timm import import_timm
from tests.skips import pytest_addoption, pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401  hooks
from tests.subprocesses import pytest_configure, pytest_pycollect_makeitem  # noqa: F401  hooks
from tests.tools import installed, tiny_vit

import_timm()
torch.set_num_threads(2)
torch.backends.cudnn.allow_tf32 = False  # a convolution in TF32 keeps only three digits of float32


@pytest.fixture
def model():
    """A float64 ViT with a class token and 24 patches of 8 x 8 in a 4 x 6 grid."""
    return tiny_vit()


@pytest.fixture
def images(model):
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="session")
def digits_model(request):
    """A ViT trained on real digits, its test images and their labels. It is trained once and then cached."""
    from safetensors.torch import load_file, save_file

    from tests.digits import load_digits

    pixels, labels = installed(load_digits)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]
    torch.manual_seed(0)
    options = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 64, "num_classes": 10}
    vit = tiny_vit(dtype=torch.float32, **options)
    recipe = hashlib.sha256(f"{options}{inspect.getsource(train)}{inspect.getsource(tiny_vit)}".encode()).hexdigest()
    file = request.config.cache.mkdir("digits") / f"vit-{recipe[:12]}.safetensors"
    if not file.exists():
        train(vit, pixels[:4000], labels[:4000])
        save_file(vit.state_dict(), file)
    vit.load_state_dict(load_file(file))
    return vit.eval(), pixels[4000:], labels[4000:]


def train(vit, pixels, labels, epochs=15, batch=50):
    steps = epochs * len(pixels) // batch
    optimizer = torch.optim.AdamW(vit.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    vit.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels)).split(batch):
            loss = torch.nn.functional.cross_entropy(vit(pixels[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@pytest.fixture
def saes():
    """TopK SAEs for blocks 1 and 2 of the tiny ViT."""
    from tests.tools import random_sae

    return {1: random_sae(32, 100, "topk", k=9, seed=1), 2: random_sae(32, 100, "topk", k=9, seed=2)}


@pytest.fixture
def gate():
    return fastfg.Gate(layers=(1, 2), kappa=1.0, c_max=50.0)
