"""Training depends on its own seed and on no other random state."""

import torch

import fastfg
from tests.sae.test_train import sparse_data


def test_the_seed_decides_the_result():
    x, _ = sparse_data(T=600)
    options = {"n_features": 64, "k": 3, "epochs": 1, "batch_size": 100}
    torch.manual_seed(1)
    once = fastfg.train_sae(x, seed=7, **options)[0].W_dec
    torch.manual_seed(2)
    assert torch.equal(fastfg.train_sae(x, seed=7, **options)[0].W_dec, once)
    assert not torch.equal(fastfg.train_sae(x, seed=8, **options)[0].W_dec, once)
