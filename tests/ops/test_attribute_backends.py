"""The default backend gives the same maps as the reference."""

import pytest
import torch

import fastfg
from tests.tools import random_sae, tiny_vit

# bfloat16 may swap a feature at the threshold for another; with few active features, that has a large effect.
ACTIVATIONS = {"topk": {"k": 32}, "relu": {}}
GATES = [None, fastfg.Gate((1, 2), kappa=1.0, c_max=50.0), fastfg.Gate((2,), kappa=0.5, c_max=10.0, shuffle_seed=3)]


def maps(dtype, activation, backend):
    """[C, B, patches] of a small model in ``dtype``."""
    model = tiny_vit(img_size=(64, 96), dtype=dtype)
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    saes = {
        block: random_sae(32, 300, activation, seed=block, dtype=dtype, **ACTIVATIONS[activation]) for block in (1, 2)
    }
    result = fastfg.attribute(model, images, saes=saes, gate=GATES, target=1, features=3, backend=backend)
    return result.maps.double().flatten(2), result


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32(activation):
    (found, ours), (expected, theirs) = (maps(torch.float32, activation, backend) for backend in ("auto", "reference"))
    error = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert float(error.max()) <= 1e-5
    for block in (1, 2):
        terms, exact = ours.features[block].values, theirs.features[block].values
        torch.testing.assert_close(terms, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16(activation):
    (found, _), (expected, _) = (maps(torch.bfloat16, activation, backend) for backend in ("auto", "reference"))
    assert float(fastfg.metrics.correlation(found, expected, kind="spearman").min()) > 0.99
