"""SAEs of other libraries: made and written by the library itself, read back, and compared with its own codes.

The tokens have ties, a zero token and one without a positive pre-activation; thresholds are met exactly. Which of two
equal pre-activations a library takes is not defined: for TopK, tokens with a tie at the last place are compared by the
values of their codes.
"""

import importlib
import sys
import types

import pytest
import torch

from fastfg.sae import load_sae
from tests.sae.writers import D, F, K, draw, tokens, weights, write_json

SITE = {"site": "resid_post"}


def library(name, package):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs {package} of the extra peers: {error}")


def same(sae, x, codes, reconstruction):
    """``codes`` [T, F] and ``reconstruction`` [T, d] are the library's."""
    codes, reconstruction = codes.detach(), reconstruction.detach()
    found = sae.encode(x)
    torch.testing.assert_close(found.sort(dim=1).values, codes.sort(dim=1).values)
    clear = ((found == codes) | ((found - codes).abs() < 1e-5)).all(1)
    assert clear.sum() >= len(x) - 2
    torch.testing.assert_close(sae(x)[clear], reconstruction[clear])


@pytest.fixture
def w():
    return weights(torch.float32)


# SAELens -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_saelens(tmp_path, w, kind):
    lens = library("sae_lens", "sae-lens")
    name = {"standard": "StandardSAE", "topk": "TopKSAE", "jumprelu": "JumpReLUSAE", "gated": "GatedSAE"}[kind]
    metadata = importlib.import_module("sae_lens.saes.sae").SAEMetadata(hook_name="blocks.3.hook_resid_post")
    options = {"d_in": D, "d_sae": F, "metadata": metadata} | ({"k": K} if kind == "topk" else {})
    theirs = getattr(lens, name)(getattr(lens, f"{name}Config")(**options))
    x = tokens(w)
    state = dict(w)
    if kind == "jumprelu":
        state["threshold"] = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])[0].abs()
    if kind == "gated":
        del state["b_enc"]
        state |= {
            name: 0.3 * draw(F, seed=i, dtype=torch.float32) for i, name in enumerate(("b_gate", "b_mag", "r_mag"))
        }
    theirs.load_state_dict(state)
    theirs.save_model(tmp_path)
    f = theirs.encode(x)
    assert kind != "jumprelu" or (f[0] == 0).all()
    same(load_sae(tmp_path), x, f, theirs.decode(f))


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "MatryoshkaBatchTopK"])
@pytest.mark.parametrize("inference", [True, False])
def test_saelens_of_training(tmp_path, w, kind, inference):
    lens = library("sae_lens", "sae-lens")
    if not hasattr(lens, f"{kind}TrainingSAE"):
        pytest.skip(f"needs sae-lens of the extra peers: no {kind}TrainingSAE")
    metadata = importlib.import_module("sae_lens.saes.sae").SAEMetadata(hook_name="blocks.3.hook_resid_post")
    options = {"matryoshka_widths": [10, F]} if "Matryoshka" in kind else {}
    config = getattr(lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=F, k=K, metadata=metadata, **options)
    theirs = getattr(lens, f"{kind}TrainingSAE")(config)
    threshold = {} if kind == "TopK" else {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    theirs.load_state_dict(w | threshold)
    (theirs.save_inference_model if inference else theirs.save_model)(tmp_path)
    x = tokens(w)
    if kind == "TopK":
        f = theirs.encode(x)
        reconstruction = theirs.decode(f)
    else:  # in use, the library compares with the threshold, in the SAE that it exports
        theirs.save_inference_model(tmp_path / "inference")
        exported = lens.SAE.load_from_disk(tmp_path / "inference")
        f = exported.encode(x)
        reconstruction = exported.decode(f)
    sae = load_sae(tmp_path)

    same(sae, x, f, reconstruction)


# sparsify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify(tmp_path, w, activation, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = library("sparsify", "eai-sparsify")
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K, activation=activation))
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    theirs.load_state_dict(state)
    theirs.save_to_disk(tmp_path)
    x = tokens(w)
    values, indices, _ = theirs.encode(x)
    f = torch.zeros(len(x), F).scatter_(1, indices, values.detach())
    same(load_sae(tmp_path, **SITE), x, f, theirs.decode(values, indices))


# dictionary_learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "Matryoshka"]
)
def test_dictionary_learning(tmp_path, w, kind, monkeypatch):
    if "nnsight" not in sys.modules:  # the buffer of language models imports it, and nothing else
        monkeypatch.setitem(sys.modules, "nnsight", types.SimpleNamespace(LanguageModel=None))
    module = {
        "AutoEncoderTopK": "trainers.top_k", "BatchTopKSAE": "trainers.batch_top_k",
        "Matryoshka": "trainers.matryoshka_batch_top_k",
    }.get(kind, "dictionary")  # fmt: skip
    learning = library(f"dictionary_learning.{module}", "dictionary-learning")
    kind = "MatryoshkaBatchTopKSAE" if kind == "Matryoshka" else kind
    more = ([10, F - 10],) if "Matryoshka" in kind else ()
    theirs = getattr(learning, kind)(D, F, *((K,) if "TopK" in kind else ()), *more)
    state = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.5), "encoder.weight": w["W_enc"].T}
    state |= {
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "bias": w["b_dec"],
        "decoder_bias": w["b_dec"],
    }
    state |= w | {"group_sizes": torch.tensor([10, F - 10])}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = (tokens(w, False) @ w["W_enc"] + w["b_enc"])[0].abs()
    own = theirs.state_dict()
    drawn = {name: 0.3 * draw(F, seed=8, dtype=torch.float32) for name in ("r_mag", "gate_bias", "mag_bias")}
    theirs.load_state_dict({name: (state | drawn)[name] for name in own})
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 6, "lm_name": "vit"}
    write_json(tmp_path, "config.json", {"trainer": trainer | {"submodule_name": "resid_post_layer_6"}})
    jump = kind == "JumpReluAutoEncoder"
    x = tokens(w, subtract=not jump)
    f = theirs.encode(x)
    same(load_sae(tmp_path, **SITE, **({"subtract_b_dec": False} if jump else {})), x, f, theirs.decode(f))


# Overcomplete --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TopKSAE", "JumpSAE", "SAE"])
def test_overcomplete(tmp_path, w, kind):
    overcomplete = library("overcomplete.sae", "overcomplete")
    encoder = overcomplete.MLPEncoder(D, F, nb_blocks=1, norm_layer=torch.nn.Identity)
    options = {"encoder_module": encoder} | ({"top_k": K} if kind == "TopKSAE" else {})
    theirs = getattr(overcomplete, kind)(D, F, **options)
    state = theirs.state_dict()
    given = {"encoder.final_block.0.weight": w["W_enc"].T, "encoder.final_block.0.bias": w["b_enc"]}
    given |= {"dictionary._weights": w["W_dec"]}
    if kind == "JumpSAE":
        given["thresholds"] = 0.3 * draw(F, seed=8, dtype=torch.float32)
    assert given.keys() <= state.keys()
    theirs.load_state_dict(state | given)
    theirs.eval()  # keeps the normalised dictionary
    torch.save(theirs.state_dict(), tmp_path / "sae.pth")
    x = tokens(w, subtract=False)
    codes = theirs.encode(x)[1]
    more = {"TopKSAE": {"k": K}, "SAE": {"activation": "relu"}}.get(kind, {})
    same(load_sae(tmp_path, row_norm="l2", **more, **SITE), x, codes, theirs.decode(codes))


# CLIP-Scope and saev -------------------------------------------------------------------------------------------------


def test_clipscope(tmp_path, w):
    scope = library("clipscope.sae", "clipscope")
    theirs = scope.TopKSAE(K, n_features=F, d_in=D, device="cpu")
    theirs.load_state_dict({"pre_b": w["b_dec"], "enc": w["W_enc"], "dec": w["W_dec"]})
    content = {"k": K, "n_features": F, "d_in": D, "model_state_dict": theirs.state_dict()}
    torch.save(content, tmp_path / "100.pt")
    x = tokens(w)
    found = theirs.forward_verbose(x)
    assert (found["latent"] < 0).any()
    same(load_sae(tmp_path, **SITE), x, found["latent"], found["reconstruction"])


def test_saev(tmp_path):
    """The legacy format, whose package reads raw activations with ``b_dec`` subtracted."""
    nn, config = library("saev.nn", "saev"), library("saev.config", "saev")
    theirs = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=3))
    w = {name: draw(*tensor.shape, seed=3, dtype=torch.float32) for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(w)
    nn.dump(str(tmp_path / "run" / "sae.pt"), theirs)
    x = draw(9, D, seed=5, dtype=torch.float32)
    x[1] = 0
    x[2] *= 16
    reconstruction, f, _ = theirs(x)
    same(load_sae(tmp_path / "run", input_mean=0, input_scale=1, **SITE), x, f, reconstruction)
