"""Reading and writing SAEs: fastfg's own format round-trips, Prisma's is read, and pickled code is never run."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastfg
from fastfg.sae.checkpoints.names import blocks_in_name
from tests.tools import ACTIVATIONS, random_sae

PRISMA = {"d_in": 32, "hook_point_layer": 9, "activation_fn_str": "relu", "normalize_activations": "layer_norm"}


def write_prisma(folder, state, without=(), **config):
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name: value for name, value in (PRISMA | config).items() if name not in without}
    (folder / "config.json").write_text(json.dumps(fields))
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_fn_str": "leaky_relu"}, "activation_fn_str: expected one of .* got 'leaky_relu'"),
        ({"activation_fn_str": ["relu"]}, r"activation_fn_str: expected one of .* got \['relu'\]"),
        ({"without": ["activation_fn_str"]}, "activation_fn_str: expected one of .* does not have the field; no"),
        ({"without": ["normalize_activations"]}, "normalize_activations: expected one of .* does not have the field"),
        ({"architecture": "jumprelu"}, "architecture: expected standard, or gated with relu, got 'jumprelu'"),
        ({"architecture": "gated", "activation_fn_str": "topk"}, "architecture: .* got 'gated' with 'topk'"),
        ({"architecture": "gated"}, r"path: expected r_mag in .*weights.pt, got \['W_dec', 'W_enc'"),
        ({"layer_subtype": "hook_mlp_out"}, "expected layer_subtype to be 'hook_resid_post' in .* got 'hook_mlp_out'"),
        (
            {"hook_point": "blocks.9.hook_mlp_out"},
            "expected hook_point to be blocks.9.hook_resid_post in .* got 'blocks.9",
        ),
        (
            {"hook_point": "blocks.3.hook_resid_post"},
            "expected hook_point to be blocks.9.hook_resid_post .* got 'blocks.3",
        ),
        ({"hook_point": 3}, "expected hook_point to be blocks.9.hook_resid_post in .* got 3"),
        ({"is_transcoder": True}, "expected is_transcoder to be False in .* got True"),
        ({"cls_token_only": True}, "expected cls_token_only to be False in .* got True"),
        ({"d_in": 31}, "expected d_in=31 in .*weights.pt, as config.json says, got 32"),
        ({"d_in": "32"}, "expected d_in in .*config.json to be an integer, got '32'"),
        ({"activation_fn_str": "topk"}, "expected the field activation_fn_kwargs in .*config.json, got"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "expected the field k in"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2.0}}, "expected k in .* integer, got 2.0"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 101}}, "k: expected 1 to 100 for a topk SAE"),
    ],
)
def test_prisma_variants_that_are_not_known(tmp_path, config, message):
    write_prisma(tmp_path, weights(random_sae(32, 100, "relu")), **config)
    with pytest.raises(ValueError, match=message) as caught:
        fastfg.load_saes(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_prisma_weights_of_another_kind(tmp_path):
    state = weights(random_sae(32, 100, "relu"))
    for extra, message in (
        (ACTIVATIONS["gated"], "got 'standard' with 'relu' and weights of a gated SAE"),
        ({"b_dec_out": torch.zeros(32)}, "got a transcoder"),
        ({"W_dec": [0.0]}, "expected W_dec in .*weights.pt to be a tensor, got list"),
        ({"b_dec": torch.zeros(32).half()}, "b_dec: expected torch.float64 on cpu, as W_enc, got torch.float16"),
        ({"W_enc": torch.zeros(32, 100, dtype=torch.long)}, "W_enc: expected a floating dtype, got torch.int64"),
        (
            {"b_dec": torch.full((32,), torch.inf).double()},
            "expected finite weights in .*, got NaN or infinity in b_dec",
        ),
        ({"b_enc": torch.full((100,), torch.nan).double()}, "expected finite weights in .* in b_enc"),
        ({"scale": torch.ones(32)}, r"expected tensors among .*weights.pt, got \['scale'\]"),
        (
            {"W_enc": torch.zeros(32, 100).to_sparse()},
            "expected W_enc in .*weights.pt to be a dense tensor, got torch.sp",
        ),
        (
            {"W_enc": torch.zeros(32, 100, device="meta")},
            "expected W_enc in .*weights.pt to be a dense tensor, got a meta",
        ),
        (
            {"W_enc": torch.quantize_per_tensor(torch.zeros(32, 100), 0.1, 0, torch.qint8)},
            "expected W_enc in .*weights.pt to be a dense tensor, got a quantized",
        ),
        ({"W_enc": torch.zeros(32, 100).to(torch.float8_e4m3fn)}, "expected W_enc in .* got torch.float8_e4m3fn"),
        ({"state_dict": 3}, "expected state_dict in .*weights.pt to be a dict, got int"),
    ):
        write_prisma(tmp_path, state | extra)
        with pytest.raises(ValueError, match=message) as caught:
            fastfg.load_saes(tmp_path)
        assert str(tmp_path) in str(caught.value)
    torch.save([1], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="expected tensors by name in .*weights.pt, got list"):
        fastfg.load_saes(tmp_path)


def own(folder, **config):
    """An SAE in fastfg's format, with some fields of its config changed. Fields given as None are left out."""
    random_sae(32, 100, "topk", k=5).save(folder)
    file = folder / "config.json"
    fields = {name: v for name, v in (json.loads(file.read_text()) | config).items() if v is not None}
    file.write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k": 2.0}, "expected k in .*config.json to be an integer, got 2.0"),
        ({"k": True}, "expected k in .*config.json to be an integer, got True"),
        ({"k": None}, "k: expected 1 to 100 for a topk SAE, got None"),
        ({"subtract_b_dec": "false"}, "expected subtract_b_dec in .*config.json to be true or false, got 'false'"),
        ({"subtract_b_dec": 1}, "expected subtract_b_dec in .*config.json to be true or false, got 1"),
        ({"activation": None}, "expected the field activation in .*config.json, got"),
        ({"activation": "elu"}, "activation: expected one of .* got 'elu'"),
        ({"normalize": 3}, "expected normalize in .*config.json to be a string, got 3"),
        ({"d": 31}, "expected d=31 in .*sae.safetensors, as config.json says, got 32"),
        ({"n_features": "100"}, "expected n_features in .*config.json to be an integer, got '100'"),
    ],
)
def test_own_configs_that_do_not_fit(tmp_path, config, message):
    own(tmp_path, **config)
    with pytest.raises(ValueError, match=message) as caught:
        fastfg.sae.load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"provenance": 3}, "expected provenance in {} to be an object, got 3"),
        ({"provenance": {"folded": 3}}, "expected provenance.folded in {} to be a list of strings, got 3"),
        ({"provenance": {"given": [3]}}, r"expected provenance.given in {} to be a list of strings, got \[3\]"),
        ({"provenance": {"recipe": "x"}}, "expected provenance.recipe in {} to be an object, got 'x'"),
        ({"provenance": {"weights": [1]}}, r"expected provenance.weights in {} to be a string, got \[1\]"),
        ({"provenance": {"site": 3}}, "expected provenance.site in {} to be a string, got 3"),
        ({"provenance": {"layer": -1}}, "expected provenance.layer in {} to be a 0-based block, got -1"),
        ({"provenance": {"layer": True}}, "expected provenance.layer in {} to be a 0-based block, got True"),
        ({"layer": -1}, "expected layer in {} to be a 0-based block, got -1"),
        ({"layer": "2"}, "expected layer in {} to be a 0-based block, got '2'"),
    ],
)
def test_where_an_own_sae_comes_from_has_its_form(tmp_path, config, message):
    own(tmp_path / "layer_2", **config)
    message = message.replace("{}", f"{tmp_path}/layer_2/config.json")
    for path, load in ((tmp_path / "layer_2", fastfg.sae.load_sae), (tmp_path, fastfg.load_saes)):
        with pytest.raises(ValueError, match=f"^path: {message}"):
            load(path)


def test_what_could_not_be_read_again_is_not_saved(tmp_path):
    sae = random_sae(32, 100, "relu")
    sae.provenance |= {"folded": ("a", "b"), "model": None, "mine": {"any": [3]}, "layer": 2}
    sae.save(tmp_path / "layer_2")
    assert fastfg.load_saes(tmp_path)[2].provenance == sae.provenance | {"folded": ["a", "b"]}
    sae.provenance["folded"] = 3
    with pytest.raises(ValueError, match=r"expected provenance.folded in .*config.json to be a list of strings, got 3"):
        sae.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_own_tensors_that_do_not_fit(tmp_path):
    own(tmp_path)
    file = tmp_path / "sae.safetensors"
    state = load_file(file)
    for changed, message in (
        (state | {"W_extra": torch.zeros(3)}, r"expected tensors among .*sae.safetensors, got \['W_extra'\]"),
        ({"W_enc": state["W_enc"]}, "expected (b_enc|W_dec|b_dec) in .*sae.safetensors, got"),
        (state | {"W_dec": torch.full((100, 32), torch.nan).double()}, "expected finite weights .* in W_dec"),
        (state | {"W_dec": torch.zeros(100, 31).double()}, r"W_dec: expected \[100, 32\] .* got \[100, 31\]"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message) as caught:
            fastfg.sae.load_sae(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_damaged_files_are_named(tmp_path):
    """Each file of both formats, cut at many lengths, raises a ValueError that names the file."""
    own(tmp_path / "own")
    write_prisma(tmp_path / "prisma", weights(random_sae(32, 100, "relu")))
    for file in ("own/config.json", "own/sae.safetensors", "prisma/config.json", "prisma/weights.pt"):
        whole = (tmp_path / file).read_bytes()
        for length in (0, 1, 2, 7, 20, len(whole) // 2, len(whole) - 2):
            (tmp_path / file).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"path: expected .* in .*{file}"):
                fastfg.sae.load_sae(tmp_path / file)
        (tmp_path / file).write_bytes(whole)
        assert fastfg.sae.load_sae(tmp_path / file).d == 32
    for text in ("[]", "3", "null", '"a"'):
        (tmp_path / "own/config.json").write_text(text)
        with pytest.raises(ValueError, match="path: expected a JSON object in .*own/config.json, got"):
            fastfg.sae.load_sae(tmp_path / "own")
    (tmp_path / "prisma/weights.pt").write_bytes(b"\x80\x02e.")  # pickle: KeyError or IndexError in its reader
    with pytest.raises(ValueError, match="path: expected tensors in .*prisma/weights.pt, got a file that is damaged"):
        fastfg.sae.load_sae(tmp_path / "prisma")


def test_tensors_that_share_memory_round_trip(tmp_path):
    W_dec = torch.randn(100, 32)
    bias = torch.zeros(1)
    sae = fastfg.SparseAutoencoder(W_dec.T, bias.expand(100), W_dec, bias.expand(32), "topk", k=5)
    sae.b_enc = sae.b_enc.index_fill(0, torch.tensor([3]), -torch.inf)  # a feature that is switched off
    sae.save(tmp_path)
    again = fastfg.sae.load_sae(tmp_path)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert sae.W_enc.data_ptr() == W_dec.data_ptr()  # unchanged


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def test_pickled_code_is_never_run(tmp_path):
    write_prisma(tmp_path, weights(random_sae(32, 100, "relu")) | {"trap": Trap()})
    with pytest.raises(ValueError, match="weights.pt, got a file that is damaged or holds pickled code") as caught:
        fastfg.load_saes(tmp_path)
    assert "a call of _pytest.outcomes" in str(caught.value)


def test_a_folder_with_one_sae_per_block(tmp_path):
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
    for key in ("4", True, -1, 2.0):
        with pytest.raises(ValueError, match=r"source: expected blocks from 0 on as keys, got \["):
            fastfg.load_saes({key: file})


def test_a_file_given_by_name_is_that_file_or_an_error(tmp_path):
    write_prisma(tmp_path, weights(random_sae(32, 100, "relu")))
    for seed, name in enumerate(("n_images_5.pt", "a.pt"), 1):
        other = random_sae(32, 100, "relu", seed=seed)
        torch.save(weights(other), tmp_path / name)
        assert torch.equal(fastfg.sae.load_sae(tmp_path / name).W_enc, other.W_enc)
        assert torch.equal(fastfg.load_saes({9: tmp_path / name})[9].W_enc, other.W_enc)
    with pytest.raises(
        ValueError, match=r"expected one SAE in .*, got \['a.pt \(Prisma\)', 'n_images_5.pt .*name the file"
    ):
        fastfg.load_saes(tmp_path)
    own(tmp_path)  # the weights of both formats, and the config of one
    assert fastfg.sae.load_sae(tmp_path).k == 5
    with pytest.raises(ValueError, match="expected an SAE of a known format .*, got .*weights.pt, which is of none"):
        fastfg.sae.load_sae(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("layer_2", {2}),
        ("layers.11", {11}),
        ("blocks.3.hook_resid_post", {3}),
        ("Block-4", {4}),
        ("clip-vit-b32_l9", {9}),
        ("l10", {10}),
        ("7", {7}),
        ("sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-2-hook_resid_post-l1-5e-05", {2}),
        ("clip-vit-l14_layer_9", {9}),
        ("clip-vit-l14_l9", {9}),
        ("l9_layer_9", {9}),
        ("layer_2_of_layer_3", {2, 3}),
        ("l2-norm_l5", {2, 5}),
        ("clip-vit-b32", set()),
        ("vit-l14", set()),
        ("ViT-L-14", set()),
        ("sae_64", set()),
        ("topk32", set()),
        ("l1-0.001", set()),
        ("l1_5e-05", set()),
        ("player2", set()),
        ("layer2b", set()),
    ],
)
def test_the_block_in_a_name(name, blocks):
    assert blocks_in_name(name) == blocks


def test_the_block_is_never_guessed(tmp_path):
    one = random_sae(32, 100, "topk", k=5)
    one.save(tmp_path / "clip-vit-b32")
    with pytest.raises(ValueError, match="layers: expected the one block that .*clip-vit-b32 belongs to, got None"):
        fastfg.load_saes(tmp_path / "clip-vit-b32")
    one.save(tmp_path / "layer_1")
    with pytest.raises(ValueError, match=r"expected the block in the config or the name of each .* \['clip-vit-b32'\]"):
        fastfg.load_saes(tmp_path)
    assert list(fastfg.load_saes(tmp_path, layers=[1])) == [1]
    one.save(tmp_path / "layer_1_layer_2")
    with pytest.raises(ValueError, match=r"source: expected one block in the name of .*, got \[1, 2\]"):
        fastfg.load_saes(tmp_path / "layer_1_layer_2")
    write_prisma(tmp_path / "l3", weights(one))
    with pytest.raises(ValueError, match="source: expected one block for .*l3, got 9 in its files and 3 in its name"):
        fastfg.load_saes(tmp_path / "l3")
    for wrong in (-2, "9", 2.0, True):
        write_prisma(tmp_path / "x", weights(one), hook_point_layer=wrong)
        with pytest.raises(ValueError, match=f"expected hook_point_layer in .* to be a block from 0 on, got {wrong!r}"):
            fastfg.load_saes(tmp_path / "x")


def test_other_folders_and_incomplete_saes(tmp_path):
    """A folder without SAE files is left out. A folder that is named as a block's SAE must be complete."""
    own(tmp_path / "layer_2")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("[" * 100_000)
    (tmp_path / "layer_9_logs").mkdir()
    assert list(fastfg.load_saes(tmp_path)) == [2]
    write_prisma(tmp_path / "layer_4", weights(random_sae(32, 100, "relu")), hook_point_layer=4)
    write_prisma(tmp_path / "other", weights(random_sae(32, 100, "relu")), hook_point_layer=5)
    assert list(fastfg.load_saes(tmp_path)) == [2, 4, 5]
    for name in ("layer_4", "other"):
        kept = (tmp_path / name / "weights.pt").read_bytes()
        (tmp_path / name / "weights.pt").unlink()
        with pytest.raises(ValueError, match=f"expected an SAE folder .* got .*{name}; its folder has config.json"):
            fastfg.load_saes(tmp_path)
        (tmp_path / name / "weights.pt").write_bytes(kept)
    (tmp_path / "layer_4" / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="path: expected JSON in .*layer_4/config.json, got RecursionError"):
        fastfg.load_saes(tmp_path)
    assert list(fastfg.load_saes(tmp_path, layers=(n for n in [2]))) == [2]
    with pytest.raises(TypeError, match="layers: expected integers, got"):
        fastfg.load_saes(tmp_path, layers=[True])


@pytest.mark.parametrize("wrong", [None, 3, b"folder", ["folder"], ""])
def test_what_is_no_path_is_named(wrong):
    got = "an empty text" if wrong == "" else re.escape(repr(wrong))
    for read, name in ((fastfg.load_saes, "source"), (fastfg.sae.load_sae, "path")):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a path, got {got}$"):
            read(wrong)
    with pytest.raises((TypeError, ValueError), match=rf"^source\[1\]: expected a path, got {got}$"):
        fastfg.load_saes({1: wrong})


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    sae = random_sae(32, 100, "topk", k=5)
    sae.W_dec[3, 2] = torch.nan
    with pytest.raises(ValueError, match="W_dec: expected finite weights, got NaN or infinity"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_missing_saes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"):
        fastfg.load_saes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected SAE folders named by block under"):
        fastfg.load_saes(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"expected an SAE folder \(fastfg: .* Prisma: .* has readme.txt"):
        fastfg.SparseAutoencoder.load(tmp_path)
    for name in ("layer_1", "block1"):
        random_sae(32, 100, "topk", k=5).save(tmp_path / name)
    with pytest.raises(ValueError, match="expected one SAE per block, got .* for block 1"):
        fastfg.load_saes(tmp_path)


def test_a_block_that_contradicts_the_files_is_refused(tmp_path):
    random_sae(8, 16, "topk", k=4, provenance={"layer": 1}).save(tmp_path / "layer_1")
    assert list(fastfg.load_saes({1: tmp_path / "layer_1"})) == [1]
    with pytest.raises(ValueError, match=r"source: expected block 1 for .*layer_1, as its files say, got 4"):
        fastfg.load_saes({4: tmp_path / "layer_1"})
