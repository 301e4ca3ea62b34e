"""Builders that the tests share, and the oracle that the library is compared with."""

from __future__ import annotations

import pytest
import torch

import fastfg
from fastfg import reference

ACTIVATIONS = {
    "topk": {"k": 9},
    "relu": {},
    "tanh_relu": {},
    "batch_topk": {"threshold": 0.5},
    "jumprelu": {"threshold": torch.rand(100, generator=torch.Generator().manual_seed(7), dtype=torch.float64)},
    "gated": {
        name: torch.randn(100, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, name in enumerate(("r_mag", "b_gate", "b_mag"))
    },
}


def tiny_vit(dtype=torch.float64, seed=0, gain=8, **options):
    """A timm VisionTransformer with random weights that are large enough to make it clearly nonlinear."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
    model = VisionTransformer(**(shape | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight" in name and parameter.ndim == 2:
                parameter.mul_(gain)
    return model.to(dtype).eval()


def random_sae(d, F, activation, seed=0, normalize="none", subtract_b_dec=True, dtype=torch.float64, **options):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return fastfg.SparseAutoencoder(
        draw(d, F) / d**0.5,
        draw(F) * 0.1,
        draw(F, d),
        draw(d) * 0.1,
        activation,
        normalize=normalize,
        subtract_b_dec=subtract_b_dec,
        **options,
    )


def installed(load):
    """The result of ``load()``, which reads a wheel. Skips the test, naming the wheel, if it is not installed."""
    try:
        return load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def record(model, images, target=None):
    """Every block's attention map and residual stream with their gradients, from timm's own unfused attention.

    Returns logits, target, attn, dattn (each a list over blocks), x and g (the same).
    """
    attn, x = [], []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda m, i, o: attn.append(o)) for block in model.blocks]
    hooks += [block.register_forward_hook(lambda m, i, o: x.append(o)) for block in model.blocks]
    fused = [block.attn.fused_attn for block in model.blocks]
    for block in model.blocks:
        block.attn.fused_attn = False
    logits = model(images)
    for hook in hooks:
        hook.remove()
    for block, flag in zip(model.blocks, fused, strict=True):
        block.attn.fused_attn = flag
    if target is None:
        target = logits.argmax(1)
    gradients = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), [*attn, *x])
    dattn, g = gradients[: len(attn)], gradients[len(attn) :]
    return logits.detach(), target, [a.detach() for a in attn], list(dattn), [t.detach() for t in x], list(g)


def dense_score(gate, sae, x, g):
    """Every score kind by its definition, with dense codes and D^T g computed in full: [B, P]."""
    if gate.score == "gradient_x_residual":
        return (g * x).sum(-1)
    f = sae.encode(x)
    W_dec = sae.W_dec
    if gate.shuffle_seed is not None:
        W_dec = W_dec[torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(gate.shuffle_seed))]
    feature_gradient = g @ W_dec.T
    score = {
        "combined": lambda: (feature_gradient * f).sum(-1),
        "activation": lambda: f.abs().sum(-1),
        "gradient": lambda: feature_gradient.abs().sum(-1),
        "gradient_signed": lambda: feature_gradient.sum(-1),
    }[gate.score]()
    return score * sae.normalize(x).scale.squeeze(-1) if gate.rescale else score


def oracle(model, images, gate=None, saes=None, identity="transmm", prefix=1, pooled=slice(0, 1), target=None):
    """The maps [B, P] in the N x N matrix form, from recorded attention maps."""
    _, _, attn, dattn, x, g = record(model, images, target)
    gates = []
    for block in range(len(attn)):
        if gate is None or block not in gate.layers:
            gates.append(None)
            continue
        s = dense_score(gate, (saes or {}).get(block), x[block][:, prefix:], g[block][:, prefix:])
        w = reference.gate(s, gate.kappa, gate.c_max)
        gates.append(torch.cat([torch.ones(len(w), prefix, dtype=w.dtype), w], dim=1))
    R = reference.relevancy_matrix(attn, dattn, gates, identity)
    return R[:, pooled].mean(1)[:, prefix:]
