"""Sparse autoencoders on the card: training, files, and reports from results on the card; see
test_rehearsal.py.
"""

import pytest
import torch

import fastfg
from fastfg import ops
from fastfg.report.overlay import displayed, save_overlay
from fastfg.sae.recipe import Recipe
from fastfg.sae.report import report
from fastfg.study import cache_tokens, train_saes
from tests.rehearsal.card import OnCard
from tests.sae.test_train import sparse_data
from tests.tools import ACTIVATIONS, random_sae, tiny_vit


def test_training_is_that_on_the_cpu():
    x, _ = sparse_data(T=120)  # the interpreter is slow
    options = {"n_features": 96, "k": 3, "epochs": 1, "batch_size": 12, "lr": 1e-3, "revivals": 0}
    sae, made = fastfg.train_sae(x, **options)
    kept = x.cuda()
    there, found = fastfg.train_sae(kept, **options)
    for name, weight in sae.state_dict().items():
        assert isinstance(there.state_dict()[name], OnCard)
        # Adam moves a feature whose gradient is only rounding by a whole step, in either direction
        near = there.state_dict()[name].cpu().isclose(weight, rtol=1e-3, atol=1e-4)
        assert near.double().mean() > 0.8
    assert found.explained_variance == pytest.approx(made.explained_variance, abs=1e-2)
    assert (found.tokens, found.steps, found.revived) == (made.tokens, made.steps, made.revived)
    assert torch.equal(kept.cpu(), x)
    assert report(there, x.cuda()[-12:]).l0 == pytest.approx(report(sae, x[-12:]).l0, abs=0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_files_and_methods(activation, tmp_path):
    sae = random_sae(32, 100, activation, normalize="layer_norm", **ACTIVATIONS[activation])
    x = torch.randn(7, 32, dtype=torch.float64)
    sae.save(tmp_path / "layer_1")
    loaded = fastfg.load_saes(tmp_path)[1]
    assert loaded.W_enc.device.type == "cpu"
    loaded = loaded.to("cuda")
    for name, tensor in loaded.state_dict().items():
        assert tensor.device == torch.device("cuda:0")
        assert torch.equal(tensor.cpu(), sae.state_dict()[name])
    torch.testing.assert_close(loaded(x.cuda()).cpu(), sae(x), rtol=1e-9, atol=1e-9)
    for part, exact in zip(loaded.encode_sparse(x.cuda()), sae.encode_sparse(x), strict=True):
        torch.testing.assert_close(part.cpu(), exact, rtol=1e-9, atol=1e-9)


def test_an_sae_made_of_weights_on_the_card():
    W = torch.randn(8, 20).cuda()
    sae = fastfg.SparseAutoencoder(W, W.new_zeros(20), W.mT, W.new_zeros(8), "batch_topk", threshold=0.5)
    assert sae.threshold.device == torch.device("cuda:0")
    assert (sae.encode(W.mT) >= 0).all()


def test_pictures(tmp_path):
    model, images = tiny_vit(dtype=torch.float32), torch.randn(2, 3, 32, 48)
    expected = fastfg.attribute(model, images)
    save_overlay(tmp_path / "cpu.png", displayed(images[0], None, None), expected.heatmap((32, 48))[0])
    found = fastfg.attribute(model.cuda(), images.cuda(), backend="reference")
    save_overlay(tmp_path / "card.png", displayed(images[0].cuda(), None, None), found.heatmap((32, 48))[0])
    from PIL import Image

    ours, theirs = (torch.tensor(list(Image.open(tmp_path / f"{n}.png").tobytes())).int() for n in ("card", "cpu"))
    assert int((ours - theirs).abs().max()) <= 1


@pytest.mark.parametrize("index", [-1, 300])
def test_an_index_out_of_range_is_named(index):
    """On a GPU, torch's own check is an assertion that ends the process's use of the GPU."""
    g, W_dec, values = (torch.randn(*shape).cuda() for shape in ((2, 8), (300, 8), (2, 3)))
    indices = torch.tensor([[0, 5, 299], [7, index, 1]]).cuda()
    for op, arguments in (
        (ops.project, (g, W_dec, values, indices)),
        (ops.decode_topk, (values, indices, W_dec, None)),
    ):
        with pytest.raises(IndexError, match=f"^indices: expected features from 0 to 299, got {index}"):
            op(*arguments, backend="reference")


def test_saes_from_tokens_on_disk(tmp_path):
    """The same SAEs as on the CPU, and the tokens are shuffled on the card."""
    images = torch.randn(12, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    cache = cache_tokens(
        tiny_vit(torch.float32), [(images, [f"image {i}" for i in range(12)])], [1], tmp_path / "tokens"
    )
    recipe = Recipe(n_features=64, k=4, steps=3, batch_size=16)  # the interpreter is slow
    options = {"held_out": 0.25, "buffer": 64}
    expected = train_saes(cache, tmp_path / "cpu", recipe, **options)
    found = train_saes(cache, tmp_path / "card", recipe, device="cuda", **options)
    assert found.keys() == expected.keys()
    assert found["trained", 1].explained_variance == pytest.approx(expected["trained", 1].explained_variance, abs=1e-4)
    theirs, ours = (fastfg.load_saes(tmp_path / where / "trained", layers=1)[1] for where in ("cpu", "card"))
    torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-4)
