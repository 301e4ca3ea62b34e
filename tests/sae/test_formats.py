"""Each public format: a file as its library writes it, read back, and compared with the formula written out here.

The tokens have ties, a zero token and a row without a positive pre-activation. Thresholds are met exactly.
"""

import json

import pytest
import torch

import fastfg
from fastfg.sae import load_sae
from fastfg.sae.checkpoints.locate import locate
from tests.sae.writers import (
    D,
    F,
    K,
    above,
    draw,
    dump,
    forget,
    layer_norm,
    pickled_config,
    save_saev,
    save_safetensors,
    save_torch,
    tokens,
    topk,
    weights,
    write_json,
)

SITE = {"site": "resid_post"}
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}


def check(sae, x, codes, reconstruction, name):
    """The SAE gives these codes, this reconstruction, and the same by its sparse codes; a round trip is bit-exact."""
    assert sae.provenance["format"] == name
    torch.testing.assert_close(sae.encode(x), codes)
    torch.testing.assert_close(sae(x), reconstruction)
    values, indices = sae.encode_sparse(x)
    torch.testing.assert_close(torch.zeros_like(codes).scatter_add_(-1, indices, values), codes)


def round_trip(sae, folder):
    sae.save(folder)
    again = load_sae(folder)
    assert again.config() == sae.config()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
        assert again.state_dict()[key].dtype == tensor.dtype


def pre(w, x, subtract=True):
    return (x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"]


def decode(w, f):
    return f @ w["W_dec"] + w["b_dec"]


# Prisma --------------------------------------------------------------------------------------------------------------

PRISMA = {
    "hook_point_layer": 9, "layer_subtype": "hook_resid_post", "activation_fn_str": "relu", "architecture": "standard",
    "normalize_activations": "layer_norm", "vit_model_name": "openai/clip", "cls_token_only": False,
    "use_patches_only": True, "d_in": D, "expansion_factor": 4,
}  # fmt: skip


@pytest.mark.parametrize("how", ["pt", "pkl", "pkl.gz", "legacy"])
def test_prisma_in_one_file_with_a_pickled_config(tmp_path, how):
    w = weights()
    config = pickled_config("vit_prisma.sae.config", "VisionModelSAERunnerConfig", PRISMA | {"_dtype": torch.float32})
    value, file = {"cfg": config, "state_dict": w}, tmp_path / f"n_images_5.{how}"
    if how.startswith("pkl"):
        dump(file, value, packed=how == "pkl.gz")
    else:
        torch.save(value, file, _use_new_zipfile_serialization=how != "legacy")
    forget(config)
    write_json(tmp_path, "config.json", PRISMA | {"normalize_activations": "none"})  # the file's own config beats it
    x = tokens(w)
    values, std, mean = layer_norm(x)
    f = pre(w, values).relu()
    saes = fastfg.load_saes(tmp_path)
    assert list(saes) == [9]
    assert saes[9].provenance["model"] == "openai/clip"
    assert saes[9].provenance["tokens"] == "patches"
    check(saes[9], x, f, decode(w, f) * std + mean, "Prisma")
    round_trip(saes[9], tmp_path / "own")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_subtype": "hook_mlp_out"}, "layer_subtype to be 'hook_resid_post' .* got 'hook_mlp_out'"),
        ({"hook_point": "blocks.9.attn.hook_z"}, "hook_point to be blocks.9.hook_resid_post .* got 'blocks.9.attn"),
        ({"cls_token_only": True}, "cls_token_only to be False .* got True"),
    ],
)
def test_prisma_pickled_configs_of_other_sites(tmp_path, fields, message):
    config = pickled_config("vit_prisma.sae.config", "VisionModelSAERunnerConfig", PRISMA | fields)
    torch.save({"cfg": config, "state_dict": weights()}, tmp_path / "a.pt")
    forget(config)
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path / "a.pt")


def test_prisma_what_an_old_config_leaves_out_is_given(tmp_path):
    w = weights()
    fields = {name: value for name, value in PRISMA.items() if name != "normalize_activations"}
    write_json(tmp_path, "config.json", fields)
    save_torch(tmp_path, "weights.pt", w)
    with pytest.raises(ValueError, match="normalize_activations: .*normalize= gives it"):
        load_sae(tmp_path)
    assert load_sae(tmp_path, normalize="none").normalization == "none"
    with pytest.raises(ValueError, match="model: expected an SAE of 'dino', got one of 'openai/clip'"):
        load_sae(tmp_path, normalize="none", model="dino")
    with pytest.raises(ValueError, match="k: expected it not to be given"):
        load_sae(tmp_path, normalize="none", k=3)
    with pytest.raises(TypeError, match="expected overrides among .* got \\['normalise'\\]"):
        load_sae(tmp_path, normalise="none")


# SAELens -------------------------------------------------------------------------------------------------------------

LENS = {
    "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float64", "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"},
}  # fmt: skip


def write_lens(folder, state, without=(), **fields):
    write_json(folder, "cfg.json", {k: v for k, v in (LENS | fields).items() if k not in without})
    save_safetensors(folder, "sae_weights.safetensors", state)
    save_safetensors(folder, "sparsity.safetensors", {"sparsity": torch.zeros(F)})


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False])
def test_saelens_standard(tmp_path, normalize, subtract):
    w = weights()
    write_lens(tmp_path, w, normalize_activations=normalize, apply_b_dec_to_input=subtract)
    x = tokens(w)
    if normalize == "constant_norm_rescale":
        x = torch.cat([x[:1], x[2:]])  # a zero token has no norm
        scale = x.norm(dim=-1, keepdim=True) / D**0.5
        values, std, mean = x / scale, scale, torch.zeros_like(scale)
    else:
        values, std, mean = layer_norm(x) if normalize == "layer_norm" else (x, torch.ones(len(x), 1), 0)
    f = pre(w, values, subtract).relu()
    saes = fastfg.load_saes(tmp_path)
    check(saes[3], x, f, decode(w, f) * std + mean, "SAELens")
    round_trip(saes[3], tmp_path / "own")


def test_saelens_jumprelu_meets_its_threshold_exactly(tmp_path):
    w = weights()
    x = tokens(w)
    z = pre(w, x)
    threshold = z[0].abs()
    write_lens(tmp_path, w | {"threshold": threshold}, architecture="jumprelu")
    f = above(z, threshold).relu()
    assert (f[0] == 0).all()
    check(load_sae(tmp_path), x, f, decode(w, f), "SAELens")


def test_saelens_training_files(tmp_path):
    """Log thresholds, and BatchTopK with decoder norms and a scalar float64 threshold; weights in float32."""
    w = weights()
    threshold = draw(F, seed=8).abs()
    write_lens(tmp_path / "a", w | {"log_threshold": threshold.log()}, architecture="jumprelu")
    x = tokens(w)
    f = above(pre(w, x), threshold.log().exp()).relu()
    sae = load_sae(tmp_path / "a")
    assert sae.provenance["folded"] == ["log_threshold"]
    check(sae, x, f, decode(w, f), "SAELens")
    w = weights(torch.float32)
    state = w | {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    for architecture in ("batchtopk", "matryoshka_batchtopk"):
        write_lens(tmp_path / "b", state, architecture=architecture, k=K, rescale_acts_by_decoder_norm=True)
        x = tokens(w)
        norm = w["W_dec"].norm(dim=1)
        f = above(pre(w, x) * norm, 0.7).relu()
        sae = load_sae(tmp_path / "b")
        assert sae.W_enc.dtype == torch.float32
        assert sae.provenance["folded"] == ["decoder_norm"]
        torch.testing.assert_close(sae.encode(x), f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(x), (f / norm) @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)
        round_trip(sae, tmp_path / "own")


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_saelens_topk(tmp_path, architecture, rescaled):
    w = weights()
    write_lens(tmp_path, w, architecture=architecture, k=K, rescale_acts_by_decoder_norm=rescaled)
    x = tokens(w)
    norm = w["W_dec"].norm(dim=1) if rescaled else torch.ones(F, dtype=torch.float64)
    z = pre(w, x) * norm
    f = topk(z, K).relu() if architecture == "topk" else topk(z, K, z.abs())
    sae = load_sae(tmp_path)
    if architecture == "abstopk":
        assert (f < 0).any()
    if not rescaled:
        check(sae, x, f, decode(w, f), "SAELens")
    torch.testing.assert_close(sae.encode(x)[2:], f[2:])
    torch.testing.assert_close(sae(x), (f / norm) @ w["W_dec"] + w["b_dec"])
    round_trip(sae, tmp_path / "own")


def test_saelens_gated(tmp_path):
    w = weights()
    gate = {"b_gate": draw(F, seed=6), "b_mag": draw(F, seed=7), "r_mag": 0.3 * draw(F, seed=8)}
    state = {name: w[name] for name in ("W_enc", "W_dec", "b_dec")} | gate
    write_lens(tmp_path, state, architecture="gated")
    x = tokens(w)
    x_in = x - w["b_dec"]
    f = (x_in @ w["W_enc"] + gate["b_gate"] > 0) * (x_in @ (w["W_enc"] * gate["r_mag"].exp()) + gate["b_mag"]).relu()
    check(load_sae(tmp_path), x, f, decode(w, f), "SAELens")


def test_saelens_before_version_6(tmp_path):
    w = weights()
    old = {
        "hook_point": "blocks.5.hook_resid_post", "hook_point_layer": 5, "activation_fn_str": "tanh-relu", "d_in": D,
        "d_sae": F, "dtype": "torch.float32", "normalize_activations": False, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": True,
    }  # fmt: skip
    factor = draw(F, seed=9).abs()
    write_json(tmp_path, "cfg.json", old)
    save_safetensors(tmp_path, "sae_weights.safetensors", w | {"finetuning_scaling_factor": factor})
    x = tokens(w)
    f = pre(w, x).relu().tanh()
    saes = fastfg.load_saes(tmp_path)
    assert list(saes) == [5]
    assert saes[5].provenance["folded"] == ["finetuning_scaling_factor"]
    check(saes[5], x, f, (f * factor) @ w["W_dec"] + w["b_dec"], "SAELens")
    write_json(tmp_path, "cfg.json", old | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}})
    f = topk(pre(w, x), K).relu()
    check(load_sae(tmp_path), x, f, (f * factor) @ w["W_dec"] + w["b_dec"], "SAELens")
    write_json(tmp_path, "cfg.json", old | {"activation_fn_str": "topk", "architecture": "gated"})
    with pytest.raises(ValueError, match="architecture: expected a known one in .*, got 'gated' with 'topk'"):
        load_sae(tmp_path)
    del old["normalize_activations"], old["apply_b_dec_to_input"]
    write_json(tmp_path, "cfg.json", old)
    with pytest.raises(ValueError, match="subtract_b_dec: expected it to be given"):
        load_sae(tmp_path, normalize="none")
    with pytest.raises(ValueError, match="normalize: expected it to be given"):
        load_sae(tmp_path, subtract_b_dec=True)
    assert load_sae(tmp_path, normalize="none", subtract_b_dec=True).provenance["given"] == [
        "normalize",
        "subtract_b_dec",
    ]


def test_saelens_input_scale(tmp_path):
    """The average norm's factor comes from the file beside it, or is given."""
    w = weights()
    write_lens(tmp_path, w, normalize_activations="expected_average_only_in")
    x = tokens(w)
    with pytest.raises(ValueError, match="input_scale: expected it to be given .* \\(1: it is folded\\)"):
        load_sae(tmp_path)
    f = pre(w, x).relu()
    check(load_sae(tmp_path, input_scale=1), x, f, decode(w, f), "SAELens")
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    f = pre(w, x * 0.25).relu()
    check(load_sae(tmp_path), x, f, decode(w, f) / 0.25, "SAELens")
    round_trip(load_sae(tmp_path), tmp_path / "own")
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": "1"}))
    with pytest.raises(ValueError, match="scaling_factor in .*activation_scaler.json to be a number > 0, got '1'"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "matching_pursuit"}, "got codes found step by step"),
        ({"architecture": "temporal"}, "got codes that depend on the other tokens"),
        ({"architecture": "skip_transcoder"}, "got a transcoder"),
        ({"architecture": "strange"}, "architecture: expected a known one in .*, got 'strange' with None"),
        ({"normalize_activations": "covariance_whitening"}, "got 'covariance_whitening' \\(an export folds it\\)"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, "site: .* got 'blocks.3.hook_mlp_out'"),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "site: .* got 'blocks.3.attn.hook_z'"),
        ({"metadata": {}}, "site: expected it to be given"),
        ({"d_in": 17}, "expected d_in=17 in .* as cfg.json says, got 16"),
        ({"architecture": "topk"}, "k: expected it to be given|decoder_norm: expected it to be given"),
    ],
)
def test_saelens_refused(tmp_path, fields, message):
    write_lens(tmp_path, weights(), **fields)
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path)


# sparsify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "groupmax", "signed", None])
def test_sparsify(tmp_path, kind):
    w = weights()
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    config = {"d_in": D, "expansion_factor": 4, "num_latents": 0, "k": K, "skip_connection": False, "transcode": False}
    config |= {"signed": True} if kind == "signed" else {} if kind is None else {"activation": kind}
    write_json(tmp_path / "layers.7", "cfg.json", config)
    save_safetensors(tmp_path / "layers.7", "sae.safetensors", state)
    x = tokens(w)
    z = pre(w, x)
    if kind == "groupmax":
        f = torch.zeros_like(z)
        for t in range(len(z)):
            for run in range(0, F, F // K):
                best = max(range(run, run + F // K), key=lambda i, t=t: (float(z[t, i]), -i))
                f[t, best] = z[t, best].relu()
    else:
        f = topk(z, K, z.abs()) if kind == "signed" else topk(z, K).relu()
    with pytest.raises(ValueError, match="site: expected it to be given"):
        fastfg.load_saes(tmp_path)
    saes = fastfg.load_saes(tmp_path, **SITE)
    assert list(saes) == [7]
    check(saes[7], x, f, decode(w, f), "sparsify")
    round_trip(saes[7], tmp_path / "own")


def test_sparsify_transcoders_and_unknown_tensors(tmp_path):
    w = weights()
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    for config, extra, message in (
        ({"k": K, "transcode": True}, {}, "got a transcoder"),
        ({"k": K}, {"W_skip": draw(D, D)}, "got a transcoder"),
        ({"k": K, "activation": "elu"}, {}, "activation: expected topk or groupmax in .*cfg.json, got 'elu'"),
        ({"k": K}, {"strange": draw(2)}, r"expected tensors among .*sae.safetensors, got \['strange'\]"),
        ({"d_in": D}, {}, "expected the field k in .*cfg.json"),
    ):
        write_json(tmp_path, "cfg.json", config)
        save_safetensors(tmp_path, "sae.safetensors", state | extra)
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path, **SITE)


# dictionary_learning -------------------------------------------------------------------------------------------------


def linear(w, b_dec="b_dec"):
    return {
        "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T, b_dec: w["b_dec"],
    }  # fmt: skip


def trainer(**fields):
    return {
        "trainer": {"layer": 6, "submodule_name": "resid_post_layer_6", "lm_name": "vit", **fields},
        "buffer": {"io": "out"},
    }


def write_dictionary(folder, state, **fields):
    write_json(folder, "config.json", trainer(**fields))
    save_torch(folder, "ae.pt", state)


def test_dictionary_learning_relu_classes(tmp_path):
    w = weights()
    x = tokens(w)
    for bias, subtract in (("bias", True), ("decoder.bias", False)):
        write_dictionary(tmp_path, linear(w, bias), dict_class="AutoEncoder")
        f = pre(w, x, subtract).relu()
        saes = fastfg.load_saes(tmp_path)
        assert list(saes) == [6]
        check(saes[6], x, f, decode(w, f), "dictionary_learning")


def test_dictionary_learning_gated(tmp_path):
    w = weights()
    gate = {"r_mag": 0.3 * draw(F, seed=8), "gate_bias": draw(F, seed=6), "mag_bias": draw(F, seed=7)}
    state = {"decoder_bias": w["b_dec"], "encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T} | gate
    write_dictionary(tmp_path, state, dict_class="GatedAutoEncoder")
    x = tokens(w)
    u = (x - w["b_dec"]) @ w["W_enc"]
    f = (u + gate["gate_bias"] > 0) * (gate["r_mag"].exp() * u + gate["mag_bias"]).relu()
    check(load_sae(tmp_path), x, f, decode(w, f), "dictionary_learning")


def test_dictionary_learning_topk_and_batch_topk_have_the_same_tensors(tmp_path):
    w = weights()
    x = tokens(w)
    z = pre(w, x)
    buffers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(float(z[0].max()), dtype=torch.float64)}
    cases = {"AutoEncoderTopK": topk(z, K).relu(), "BatchTopKSAE": above(z, buffers["threshold"]).relu()}
    assert (cases["BatchTopKSAE"][0] == 0).all()  # the threshold is met exactly there
    for dict_class, f in cases.items():
        write_dictionary(tmp_path, linear(w) | buffers, dict_class=dict_class)
        check(load_sae(tmp_path), x, f, decode(w, f), "dictionary_learning")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="activation: expected it to be given .* have the same tensors"):
        load_sae(tmp_path / "ae.pt", **SITE)
    for kind, f in (("topk", cases["AutoEncoderTopK"]), ("batch_topk", cases["BatchTopKSAE"])):
        sae = fastfg.load_saes(tmp_path / "ae.pt", layers=2, activation=kind, **SITE)[2]
        check(sae, x, f, decode(w, f), "dictionary_learning")
    save_torch(tmp_path, "ae.pt", linear(w))  # an older file
    with pytest.raises(ValueError, match="k: expected it to be given"):
        load_sae(tmp_path / "ae.pt", activation="topk", **SITE)
    with pytest.raises(ValueError, match="threshold: expected it to be given"):
        load_sae(tmp_path / "ae.pt", activation="batch_topk", **SITE)
    never = linear(w) | {"threshold": torch.tensor(-1.0), "k": torch.tensor(K)}
    write_dictionary(tmp_path, never, dict_class="BatchTopKSAE")  # a threshold that was never estimated
    check(load_sae(tmp_path), x, z.relu(), decode(w, z.relu()), "dictionary_learning")


def test_dictionary_learning_matrices(tmp_path):
    """JumpReLU, Matryoshka, and sae-for-vlm's fork of it."""
    w = weights()
    x = tokens(w)
    threshold = draw(F, seed=8).abs()
    write_dictionary(tmp_path, w | {"threshold": threshold}, dict_class="JumpReluAutoEncoder")
    with pytest.raises(ValueError, match="subtract_b_dec: expected it to be given"):
        load_sae(tmp_path)
    f = above(pre(w, x, False), threshold).relu()
    check(load_sae(tmp_path, subtract_b_dec=False), x, f, decode(w, f), "dictionary_learning")
    state = w | {"k": torch.tensor(K), "threshold": torch.tensor(0.5), "group_sizes": torch.tensor([10, 30])}
    f = above(pre(w, x), 0.5).relu()
    write_dictionary(tmp_path, state, dict_class="MatryoshkaBatchTopKSAE")
    check(load_sae(tmp_path), x, f, decode(w, f), "dictionary_learning")
    fork = {"dict_class": "MatroyshkaBatchTopKSAE", "layer": "", "lm_name": "", "submodule_name": ""}
    write_dictionary(tmp_path, state, **fork)
    with pytest.raises(ValueError, match="tokens: expected it to be given .* class tokens"):
        fastfg.load_saes(tmp_path, layers=3, **SITE)
    with pytest.raises(ValueError, match=r"tokens: expected \('patches', 'all'\) .* got 'cls'"):
        fastfg.load_saes(tmp_path, layers=3, tokens="cls", **SITE)
    sae = fastfg.load_saes(tmp_path, layers=3, tokens="all", **SITE)[3]
    assert sae.provenance["layer"] == 3
    check(sae, x, f, decode(w, f), "dictionary_learning")


def test_dictionary_learning_refused(tmp_path):
    write_dictionary(tmp_path, {"step": 1, "ae": linear(weights()), "optimizer": {}, "config": {}, "norm_factor": 1.0})
    with pytest.raises(ValueError, match="got a backup of an unfinished run"):
        load_sae(tmp_path)
    write_dictionary(tmp_path, linear(weights(), "bias"), submodule_name="mlp_out")
    with pytest.raises(ValueError, match="site: expected an SAE of a block's output .* got 'mlp_out'"):
        load_sae(tmp_path)


# saev ----------------------------------------------------------------------------------------------------------------


def header(schema, cls, **params):
    activation = {"cls": cls, "params": params}
    return {"schema": schema, "cfg": {"d_model": D, "d_sae": F, "activation": activation}, "commit": "x", "lib": "y"}


@pytest.mark.parametrize("schema", [2, 3, 4, 5])
def test_saev(tmp_path, schema):
    w = weights()
    x = tokens(w, subtract=False)
    z = pre(w, x, subtract=False)
    threshold = z[0].max()
    cases = {
        ("Relu", ()): z.relu(),
        ("TopK", (("top_k", K),)): topk(z, K),
        ("BatchTopK", (("top_k", K),)): above(z, threshold).relu(),
    }
    assert (cases["TopK", (("top_k", K),)] < 0).any()  # it keeps the sign
    for (cls, params), f in cases.items():
        extra = {"activation.threshold": threshold} if cls == "BatchTopK" else {}
        save_saev(tmp_path, header(schema, cls, **dict(params)), w | extra)
        with pytest.raises(ValueError, match="layers: expected the one block"):
            fastfg.load_saes(tmp_path, **SITE)
        check(fastfg.load_saes(tmp_path, layers=4, **SITE)[4], x, f, decode(w, f), "saev")
        round_trip(load_sae(tmp_path, **SITE), tmp_path / "own")
    save_saev(tmp_path, header(schema, "BatchTopK", top_k=K), w | {"activation.threshold": torch.tensor(-0.5)})
    check(load_sae(tmp_path, **SITE), x, z.relu(), decode(w, z.relu()), "saev")


def test_saev_legacy_files_need_the_mean_and_the_scale(tmp_path):
    w = weights()
    save_saev(tmp_path, {"d_vit": D, "exp_factor": 4, "sparsity_coeff": 4e-4, "seed": 0}, w)
    with pytest.raises(ValueError, match="input_mean: expected it to be given .* have neither"):
        load_sae(tmp_path, **SITE)
    with pytest.raises(ValueError, match="input_scale: expected it to be given"):
        load_sae(tmp_path, input_mean=0, **SITE)
    mean = draw(D, seed=11)
    x = tokens(w)
    f = pre(w, (x - mean) / 2.018).relu()
    sae = load_sae(tmp_path, input_mean=mean, input_scale=2.018, **SITE)
    check(sae, x, f, decode(w, f) * 2.018 + mean, "saev")
    round_trip(sae, tmp_path / "own")
    raw = load_sae(tmp_path, input_mean=0, input_scale=1, **SITE)
    assert raw.input_mean is raw.input_scale is None


def test_saev_schema_1_is_ambiguous(tmp_path):
    w = weights()
    x = tokens(w)
    for first in ({"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "top_k": K}}, header(1, "TopK", top_k=K)):
        save_saev(tmp_path, first, w)
        with pytest.raises(ValueError, match="subtract_b_dec: expected it to be given .* 31 July 2025"):
            load_sae(tmp_path, **SITE)
        for subtract in (True, False):
            f = topk(pre(w, x, subtract), K)
            check(load_sae(tmp_path, subtract_b_dec=subtract, **SITE), x, f, decode(w, f), "saev")


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (header(6, "Relu"), "schema: expected one of .* got 6"),
        (header(2, "AbsBatchTopK", top_k=K), "activation: expected one of .* got 'AbsBatchTopK'"),
        (header(2, "BatchTopK", top_k=K), "threshold: expected it to be given .* saved no threshold"),
        (header(2, "TopK", top_k="x"), "expected top_k in .*sae.pt to be an integer, got 'x'"),
        ({"schema": 2}, "expected the field cfg in .*sae.pt"),
        (header(2, "Relu") | {"cfg": {"d_model": 3, "activation": {"cls": "Relu"}}}, "expected d_model=3 .* got 16"),
    ],
)
def test_saev_refused(tmp_path, first, message):
    save_saev(tmp_path, first, weights())
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path, **SITE)


# patchsae, OpenAI, CLIP-Scope, Gemma Scope ---------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [True, False])
def test_patchsae(tmp_path, pickled):
    w = weights()
    fields = {"block_layer": -2, "module_name": "resid", "class_token": False, "model_name": "openai/clip", "d_in": D}
    fields |= {"dtype": torch.float32, "device": torch.device("cpu")}
    config = pickled_config("sae_training.config", "ViTSAERunnerConfig", fields) if pickled else dict(fields)
    torch.save({"cfg" if pickled else "config": config, "state_dict": w}, tmp_path / "out.pt")
    if pickled:
        forget(config)
    with pytest.raises(ValueError, match="layers: expected the one block"):
        fastfg.load_saes(tmp_path)
    x = tokens(w)
    f = pre(w, x).relu()
    check(fastfg.load_saes(tmp_path, layers=10)[10], x, f, decode(w, f), "patchsae")
    for change, message in (
        ({"class_token": True}, "got one of the class token alone"),
        ({"module_name": "mlp"}, "site: .* got 'mlp'"),
        ({"gated_sae": True}, "got a gated SAE"),
    ):
        torch.save({"config": fields | change, "state_dict": w}, tmp_path / "out.pt")
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_openai(tmp_path, tied):
    w = weights()
    if tied:
        w["W_dec"] = w["W_enc"].T
    state = {"pre_bias": w["b_dec"], "encoder.weight": w["W_enc"].T.contiguous(), "latent_bias": w["b_enc"]}
    decoder = {"decoder.linear.weight": state["encoder.weight"]} if tied else {"decoder.weight": w["W_dec"].T}
    stats = {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_mean_square": torch.zeros(F)}
    x = tokens(w)
    save_torch(tmp_path, "a.pt", state | decoder | stats)
    f = pre(w, x).relu()
    check(load_sae(tmp_path, **SITE), x, f, decode(w, f), "OpenAI")
    values, std, mean = layer_norm(x)
    for post in ("ReLU", "Identity"):
        options = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": post}}
        save_torch(tmp_path, "a.pt", state | decoder | options)
        f = topk(pre(w, values), K)
        f = f.relu() if post == "ReLU" else f
        check(load_sae(tmp_path, **SITE), x, f, decode(w, f) * std + mean, "OpenAI")
    save_torch(tmp_path, "a.pt", state | decoder | {"activation": "Identity"})
    with pytest.raises(ValueError, match="activation: expected ReLU or TopK in .*, got 'Identity'"):
        load_sae(tmp_path, **SITE)
    save_torch(tmp_path, "a.pt", state | decoder | {"activation": "TopK", "activation_state_dict": {"k": K}})
    with pytest.raises(ValueError, match="post: expected it to be given"):
        load_sae(tmp_path, **SITE)


def test_clipscope(tmp_path):
    w = weights(torch.float32)
    model = {"pre_b": w["b_dec"], "enc": w["W_enc"], "dec": w["W_dec"]}
    torch.save({"k": K, "n_features": F, "d_in": D, "model_state_dict": model}, tmp_path / "100.pt")
    x = tokens(w)
    f = topk((x - w["b_dec"]) @ w["W_enc"], K)
    assert (f < 0).any()
    with pytest.raises(ValueError, match="site: expected it to be given"):
        fastfg.load_saes(tmp_path, layers=22)
    check(fastfg.load_saes(tmp_path, layers=22, **SITE)[22], x, f, decode(w, f), "CLIP-Scope")
    torch.save({"k": K, "n_features": F + 1, "d_in": D, "model_state_dict": model}, tmp_path / "100.pt")
    with pytest.raises(ValueError, match="expected n_features=41 in .* got 40"):
        load_sae(tmp_path, **SITE)


@pytest.mark.parametrize("how", ["npz", "safetensors"])
def test_gemma_scope(tmp_path, how):
    w = weights(torch.float32)
    x = tokens(w, subtract=False)
    z = pre(w, x, subtract=False)
    state = {name.lower(): tensor for name, tensor in w.items()} | {"threshold": z[0].abs()}
    if how == "npz":
        import numpy as np

        np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        save_safetensors(tmp_path, "params.safetensors", state)
        write_json(tmp_path, "config.json", {"architecture": "jump_relu"})
    f = above(z, z[0].abs()).relu()
    assert (f[0] == 0).all()
    check(load_sae(tmp_path, **SITE), x, f, decode(w, f), "Gemma Scope")
    if how == "safetensors":
        save_safetensors(tmp_path, "params.safetensors", state | {"affine_skip_connection": draw(D, D)})
        with pytest.raises(ValueError, match="got a transcoder with a skip"):
            load_sae(tmp_path, **SITE)


# Overcomplete --------------------------------------------------------------------------------------------------------


def overcomplete(w, **extra):
    return {
        "encoder.final_block.0.weight": w["W_enc"].T, "encoder.final_block.0.bias": w["b_enc"],
        "dictionary._weights": w["W_dec"], "dictionary.multiplier": torch.tensor(0.3, dtype=torch.float64),
    } | extra  # fmt: skip


@pytest.mark.parametrize("row_norm", ["l2", "l1", "max_l2", "max_l1", "identity"])
def test_overcomplete(tmp_path, row_norm):
    w = weights()
    save_torch(tmp_path, "sae.pth", overcomplete(w))
    x = tokens(w, subtract=False)
    z = pre(w, x, subtract=False).relu()
    norms = w["W_dec"].norm(p=1 if "l1" in row_norm else 2, dim=1, keepdim=True)
    D_ = w["W_dec"] / {"identity": 1, "max_l2": norms.max(), "max_l1": norms.max()}.get(row_norm, norms + 1e-8)
    D_ = D_ * torch.tensor(0.3, dtype=torch.float64).exp()
    met = float(z[0].max())
    for given, f in (({"k": K}, topk(z, K)), ({"activation": "relu"}, z), ({"threshold": met}, above(z, met, False))):
        sae = load_sae(tmp_path, row_norm=row_norm, **given, **SITE)
        check(sae, x, f, f @ D_, "Overcomplete")
        round_trip(sae, tmp_path / "own")
    assert sae.encode(x)[0].max() == met  # it is kept where it is met


def test_overcomplete_jump_tied_and_batch_norm(tmp_path):
    w = weights()
    x = tokens(w, subtract=False)
    z = pre(w, x, subtract=False).relu()
    rows = w["W_dec"] / (w["W_dec"].norm(dim=1, keepdim=True) + 1e-8) * torch.tensor(0.3, dtype=torch.float64).exp()
    log = draw(F, seed=8)
    save_torch(tmp_path, "a.pth", overcomplete(w, thresholds=log))
    f = above(z, log.exp(), False)
    check(load_sae(tmp_path, row_norm="l2", **SITE), x, f, f @ rows, "Overcomplete")
    tied = {name: value for name, value in overcomplete(w).items() if "final_block" not in name}
    save_torch(tmp_path, "a.pth", tied | {"encoder.bias": w["b_enc"]})
    f = topk((x @ rows.T + w["b_enc"]).relu(), K)
    sae = load_sae(tmp_path, row_norm="l2", k=K, **SITE)
    assert "tied encoder" in sae.provenance["folded"]
    check(sae, x, f, f @ rows, "Overcomplete")
    norm = {
        "running_mean": draw(F, seed=1), "running_var": draw(F, seed=2).abs() + 0.1, "weight": draw(F, seed=3),
        "bias": draw(F, seed=4), "num_batches_tracked": torch.tensor(3),
    }  # fmt: skip
    named = {f"encoder.final_block.1.{name}": value for name, value in norm.items()}
    save_torch(tmp_path, "a.pth", {f"module.{name}": value for name, value in overcomplete(w, **named).items()})
    z = pre(w, x, subtract=False)
    z = (z - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
    f = topk(z.relu(), K)
    check(load_sae(tmp_path, row_norm="l2", k=K, **SITE), x, f, f @ rows, "Overcomplete")
    for extra, message in (
        ({"encoder.final_block.1.weight": draw(F)}, "expected an encoder without LayerNorm over the features"),
        ({"encoder.mlp_blocks.0.weight": draw(F)}, "got a deeper one"),
        ({"strange": draw(F)}, r"expected tensors among .* got \['strange'\]"),
    ):
        save_torch(tmp_path, "a.pth", overcomplete(w, **extra))
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path, row_norm="l2", k=K, **SITE)


def test_overcomplete_archetypal(tmp_path):
    w = weights()
    parts = {"C": draw(7, D, seed=1), "W": draw(F, 7, seed=2), "Relax": draw(F, D, seed=3)}
    parts["W"][5] = -1  # a row without a positive weight
    state = {name: value for name, value in overcomplete(w).items() if name != "dictionary._weights"}
    save_torch(tmp_path, "a.pth", state | {f"dictionary.{name}": value for name, value in parts.items()})
    with pytest.raises(ValueError, match="delta: expected it to be given"):
        load_sae(tmp_path, k=K, **SITE)
    mix = parts["W"].relu()
    mix = mix / (mix.sum(-1, keepdim=True) + 1e-8)
    relax = parts["Relax"] * (1.5 / parts["Relax"].norm(dim=-1, keepdim=True)).clamp(max=1)
    rows = (mix @ parts["C"] + relax) * torch.tensor(0.3, dtype=torch.float64).exp()
    x = tokens(w, subtract=False)
    f = topk(pre(w, x, subtract=False).relu(), K)
    check(load_sae(tmp_path, k=K, delta=1.5, **SITE), x, f, f @ rows, "Overcomplete")


def test_overcomplete_says_too_little(tmp_path):
    save_torch(tmp_path, "a.pth", overcomplete(weights()))
    for given, message in (
        ({"k": K}, "row_norm: expected it to be given"),
        ({"row_norm": "l2"}, "expected one of k, threshold and activation to be given"),
        ({"row_norm": "l2", "k": K, "threshold": 0.1}, "expected one of k, threshold and activation"),
        ({"row_norm": "l3", "k": K}, "row_norm: expected one of .* got 'l3'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path, **given, **SITE)


# The BatchTopK reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("kind", ["vanilla", "topk", "batchtopk", "jumprelu"])
def test_batch_topk_reference(tmp_path, kind, normed):
    w = weights()
    log = draw(F, seed=8)
    config = {
        "sae_type": kind, "top_k": K, "input_unit_norm": normed, "site": "resid_post", "layer": 8, "act_size": D,
        "dict_size": F, "hook_point": "blocks.8.hook_resid_post", "model_name": "vit", "dtype": "torch.float32",
    }  # fmt: skip
    write_json(tmp_path, "config.json", config)
    save_torch(tmp_path, "sae.pt", w | ({"jumprelu.log_threshold": log} if kind == "jumprelu" else {}))
    x = tokens(w)
    values, std, mean = layer_norm(x) if normed else (x, torch.ones(len(x), 1), 0)
    without = values @ w["W_enc"] - w["b_dec"] @ w["W_enc"]
    given, f = {
        "vanilla": ({}, pre(w, values).relu()),
        "topk": ({}, topk(without, K).relu()),
        "batchtopk": ({"threshold": 0.4}, above(without, 0.4).relu()),
        "jumprelu": ({"subtract_b_dec": False}, above(pre(w, values, False), log.exp()).relu()),
    }[kind]
    for name in given:
        with pytest.raises(ValueError, match=f"{name}: expected it to be given"):
            load_sae(tmp_path)
    saes = fastfg.load_saes(tmp_path, **given)
    assert list(saes) == [8]
    check(saes[8], x, f, decode(w, f) * std + mean, "BatchTopK")


def test_batch_topk_reference_of_another_site(tmp_path):
    config = {"sae_type": "topk", "top_k": K, "input_unit_norm": True, "site": "resid_pre", "layer": 8}
    write_json(tmp_path, "config.json", config)
    save_torch(tmp_path, "sae.pt", weights())
    with pytest.raises(ValueError, match="site: expected an SAE of a block's output .* got 'resid_pre'"):
        load_sae(tmp_path)


# Files that are known by sight, and files of no format ---------------------------------------------------------------


def test_refused_by_sight(tmp_path):
    for content, message in (
        ({"model": {}, "mean_center": torch.zeros(3), "scaling_factor": 1.0, "target_norm": 1.0}, "an MSAE of pooled"),
        ({"encoder_linear.weight": torch.zeros(3, 3)}, "Goodfire's layout"),
        ({"config": {}, "autoencoder": {}}, "hook_mlp_out"),
        (torch.nn.Linear(3, 3), "a whole pickled module \\(torch.nn.modules.linear.Linear\\)"),
        ({"a": torch.zeros(3)}, "expected an SAE of a known format .*CLIP-Scope: .* which is of none"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path / "a.pt", **SITE)


def test_names_of_files_and_folders_do_not_matter(tmp_path):
    w = weights()
    save_saev(tmp_path, header(2, "Relu"), w)
    (tmp_path / "sae.pt").rename(tmp_path / "params.npz")
    assert load_sae(tmp_path, **SITE).provenance["format"] == "saev"
    assert locate(tmp_path / "params.npz").form.NAME == "saev"
