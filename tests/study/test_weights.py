"""What tells SAEs apart: everything that their codes depend on."""

import pytest

from fastfg.models import adapt
from fastfg.models.fingerprint import fingerprints
from fastfg.study.weights import check_weights, sae_fingerprint
from tests.tools import random_sae, tiny_vit


def sae(**options):
    return random_sae(8, 16, options.pop("activation", "topk"), **({"k": 4} | options))


@pytest.mark.parametrize(
    "options", [{"k": 5}, {"normalize": "layer_norm"}, {"subtract_b_dec": False}, {"post": "none"}, {"seed": 1}]
)
def test_settings_and_weights_tell_saes_apart(options):
    assert sae_fingerprint(sae(**options)) != sae_fingerprint(sae())


def test_saes_of_blocks_that_the_model_lacks_are_named():
    adapter = adapt(tiny_vit())
    with pytest.raises(ValueError, match=r"saes: expected blocks from 0 to 3, as the model has, got \[99\]"):
        check_weights(adapter, {99: sae(provenance={"weights": "abc"})})


def test_saes_of_a_model_with_another_patch_embedding_are_refused():
    model = tiny_vit()
    adapter = adapt(model)
    saes = {1: sae(provenance={"weights": fingerprints(adapter, [1])[1]})}
    check_weights(adapter, saes)
    model.head.weight.data.add_(1)
    check_weights(adapter, saes)
    model.patch_embed.proj.weight.data.mul_(-1)
    with pytest.raises(ValueError, match=r"saes: expected SAEs of this model's weights, got .* for blocks \[1\]"):
        check_weights(adapter, saes)


def test_where_an_sae_comes_from_does_not():
    assert sae_fingerprint(sae(provenance={"file": "a"})) == sae_fingerprint(sae())
