"""The gradients of a TopK SAE from its active features equal autograd's, and the step equals torch's Adam."""

import pytest
import torch

from fastfg import reference
from tests.ops.test_adam_topk import arguments

PREFIX = ("x", "g", "values", "indices")


def sae(seed=0, T=9, d=7, F=20):
    random = torch.Generator().manual_seed(seed)
    x, W_enc, W_dec = (torch.randn(*s, generator=random, dtype=torch.float64) for s in ((T, d), (d, F), (F, d)))
    b_enc, b_dec = (0.1 * torch.randn(n, generator=random, dtype=torch.float64) for n in (F, d))
    return x, [w.requires_grad_() for w in (W_enc, b_enc, W_dec, b_dec)]


def codes_of(pre, k):
    values, indices = pre.topk(k, dim=-1)
    return values.relu(), indices


def decode(values, indices, W_dec):
    return torch.zeros(len(values), len(W_dec), dtype=values.dtype).scatter(1, indices, values) @ W_dec


def test_gradients_equal_autograds():
    """Also with many codes that are 0, and with the auxiliary loss, whose target has no gradient."""
    x, (W_enc, b_enc, W_dec, b_dec) = sae()
    pre, dead = (x - b_dec) @ W_enc + b_enc, torch.tensor([1, 4, 6, 11, 13])
    values, indices = codes_of(pre, 15)
    aux_values, among = codes_of(pre[:, dead], 3)
    assert 0 < int((values == 0).sum()) < values.numel()
    x_hat = decode(values, indices, W_dec) + b_dec
    residual = (x - x_hat).detach()
    e_hat = decode(aux_values, among, W_dec[dead])
    loss = (x_hat - x).square().sum(-1).mean() + (e_hat - residual).square().sum(-1).mean() / 32
    expected = torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b_dec))
    with torch.no_grad():
        g, aux_g = 2 / len(x) * (x_hat - x), 2 / len(x) / 32 * (e_hat - residual)
        main = reference.topk_gradients(x - b_dec, g, values, indices, W_dec)
        aux = reference.topk_gradients(x - b_dec, aux_g, aux_values, dead[among], W_dec)
        found = [a + b for a, b in zip(main, aux, strict=True)]
        found.append(g.sum(0) - W_enc @ found[1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    """By finite differences, of the loss ``sum(x_hat * c)``, whose gradient at x_hat is c."""
    x, (W_enc, b_enc, W_dec, _) = sae(T=3, d=4, F=6)
    c = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    indices = codes_of(x @ W_enc + b_enc, 2)[1]

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, W_enc, b_enc, W_dec):
            values = (x @ W_enc + b_enc).gather(1, indices).relu()
            ctx.gradients = reference.topk_gradients(x, c, values, indices, W_dec)
            return (reference.decode_topk(values, indices, W_dec, None) * c).sum()

        @staticmethod
        def backward(ctx, of_loss):
            return tuple(of_loss * gradient for gradient in ctx.gradients)

    assert torch.autograd.gradcheck(Loss.apply, (W_enc, b_enc, W_dec), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_three_steps_equal_torchs_adam(unit_norm):
    given = arguments(seed=3)
    weights = given["weights"]
    theirs = [w.clone().requires_grad_() for w in weights]
    adam = torch.optim.Adam(theirs, lr=0.01)
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in (1, 2, 3):
        codes = [arguments(seed=step)[name] for name in PREFIX]
        gradients = reference.topk_gradients(*codes, theirs[2].detach())
        for weight, gradient in zip(theirs, gradients, strict=True):
            weight.grad = gradient.clone()
        if unit_norm:
            row = theirs[2].detach()
            theirs[2].grad -= (theirs[2].grad * row).sum(1, keepdim=True) * row
        adam.step()
        if unit_norm:
            with torch.no_grad():
                theirs[2].div_(theirs[2].norm(dim=1, keepdim=True))
        reference.adam_topk(*codes, None, None, None, weights, m, v, 0.01, 0.9, 0.999, 1e-8, step, unit_norm)
        for ours, other in zip(weights, theirs, strict=True):
            torch.testing.assert_close(ours, other.detach(), rtol=1e-10, atol=1e-12)
