"""What tells SAEs apart: everything that their codes depend on."""

import pytest

from fastfg.study.weights import sae_fingerprint
from tests.tools import random_sae


def sae(**options):
    return random_sae(8, 16, options.pop("activation", "topk"), **({"k": 4} | options))


@pytest.mark.parametrize(
    "options", [{"k": 5}, {"normalize": "layer_norm"}, {"subtract_b_dec": False}, {"post": "none"}, {"seed": 1}]
)
def test_settings_and_weights_tell_saes_apart(options):
    assert sae_fingerprint(sae(**options)) != sae_fingerprint(sae())


def test_where_an_sae_comes_from_does_not():
    assert sae_fingerprint(sae(provenance={"file": "a"})) == sae_fingerprint(sae())
