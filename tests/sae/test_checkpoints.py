"""Reading and writing SAEs: fastfg's own format round-trips, Prisma's is read, and no pickled code is run."""

import json
import pickle

import pytest
import torch

import fastfg
from tests.tools import ACTIVATIONS, random_sae


def write_prisma(folder, state, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"d_in": 32, "hook_point_layer": 9} | config))
    torch.save(state, folder / "weights.pt")


def weights(sae):
    return {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_own_format_round_trips(tmp_path, activation, normalize):
    sae = random_sae(32, 100, activation, normalize=normalize, subtract_b_dec=False, **ACTIVATIONS[activation])
    sae.save(tmp_path / "sae")
    again = fastfg.SparseAutoencoder.load(tmp_path / "sae")
    assert again.config() == sae.config()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert again.state_dict()[name].dtype == tensor.dtype
    x = torch.randn(4, 32, dtype=torch.float64)
    assert torch.equal(again.encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"activation_fn_str": "relu", "normalize_activations": "layer_norm"}, ("relu", {}, "layer_norm")),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 9}, "normalize_activations": None},
            ("topk", {"k": 9}, "none"),
        ),
        (
            {"activation_fn_str": "tanh-relu", "normalize_activations": "constant_norm_rescale"},
            ("tanh_relu", {}, "constant_norm"),
        ),
        (
            {"activation_fn_str": "relu", "architecture": "gated", "normalize_activations": "none"},
            ("gated", ACTIVATIONS["gated"], "none"),
        ),
    ],
)
def test_prisma(tmp_path, config, expected):
    activation, options, normalize = expected
    sae = random_sae(32, 100, activation, normalize=normalize, **options)
    state = weights(sae) | (options if activation == "gated" else {})
    write_prisma(tmp_path / "sae", state, **config)
    found = fastfg.load_saes(tmp_path / "sae")
    assert list(found) == [9]
    x = torch.randn(4, 32, dtype=torch.float64)
    assert torch.equal(found[9].encode(x), sae.encode(x))


def test_prisma_variants_that_are_not_known(tmp_path):
    write_prisma(tmp_path, weights(random_sae(32, 100, "relu")), activation_fn_str="leaky_relu")
    with pytest.raises(ValueError, match="activation_fn_str: expected one of .* got 'leaky_relu'"):
        fastfg.load_saes(tmp_path)
    write_prisma(tmp_path, weights(random_sae(32, 100, "relu")), architecture="jumprelu")
    with pytest.raises(ValueError, match="architecture: expected standard, or gated with relu, got 'jumprelu'"):
        fastfg.load_saes(tmp_path)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def test_pickled_code_is_never_run(tmp_path):
    write_prisma(tmp_path, weights(random_sae(32, 100, "relu")) | {"trap": Trap()})
    with pytest.raises(pickle.UnpicklingError):
        fastfg.load_saes(tmp_path)


def test_a_folder_with_one_a_block(tmp_path):
    for name, k in (("layer_2", 2), ("blocks.3.hook_resid_post", 3), ("11", 11)):
        random_sae(32, 100, "topk", k=k).save(tmp_path / name)
    write_prisma(tmp_path / "sparse_autoencoder_x", weights(random_sae(32, 100, "relu")))
    (tmp_path / "logs").mkdir()
    found = fastfg.load_saes(tmp_path)
    assert {block: sae.k for block, sae in found.items()} == {2: 2, 3: 3, 9: None, 11: 11}
    assert list(fastfg.load_saes(tmp_path, layers=[3, 2])) == [3, 2]
    with pytest.raises(ValueError, match=r"layers: expected blocks among \[2, 3, 9, 11\] .* got \[4\]"):
        fastfg.load_saes(tmp_path, layers=[2, 4])


def test_one_file_and_a_mapping(tmp_path):
    random_sae(32, 100, "topk", k=5).save(tmp_path / "mine")
    file = tmp_path / "mine" / "sae.safetensors"
    assert list(fastfg.load_saes(file, layers=[7])) == [7]
    assert list(fastfg.load_saes({4: tmp_path / "mine", 5: file})) == [4, 5]
    with pytest.raises(ValueError, match="layers: expected the one block that .* belongs to, got None"):
        fastfg.load_saes(file)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"):
        fastfg.load_saes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected SAE folders named by block under"):
        fastfg.load_saes(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"expected an SAE folder \(fastfg: .* Prisma: .* with readme.txt"):
        fastfg.SparseAutoencoder.load(tmp_path)
    for name in ("layer_1", "block1"):
        random_sae(32, 100, "topk", k=5).save(tmp_path / name)
    with pytest.raises(ValueError, match="expected one SAE a block, got .* for block 1"):
        fastfg.load_saes(tmp_path)
