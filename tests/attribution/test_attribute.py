"""``attribute`` (the row form, computed by hooks in one backward pass) equals the matrix form of recorded maps."""

import itertools
import threading

import pytest
import torch

import fastfg
from tests.tools import ACTIVATIONS, dense_score, oracle, random_sae, record, tiny_vit

KINDS = [
    {"score": "combined"},
    {"score": "combined", "shuffle_seed": 12345},
    {"score": "activation"},
    {"score": "gradient"},
    {"score": "gradient_signed"},
    {"score": "gradient_x_residual"},
]
# (options of the model, prefix tokens, pooled tokens)
MODELS = {
    "class token": ({}, 1, slice(0, 1)),
    "class token and 4 registers": ({"reg_tokens": 4}, 5, slice(0, 1)),
    "LayerScale": ({"init_values": 0.7}, 1, slice(0, 1)),
    "mean of patches": ({"global_pool": "avg"}, 1, slice(1, None)),
    "mean of all tokens": ({"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 4}, 5, slice(0, None)),
    "no class token": ({"global_pool": "avg", "class_token": False}, 0, slice(0, None)),
    "odd number of patches": ({"img_size": (24, 40)}, 1, slice(0, 1)),
    "qk norm": ({"qk_norm": True}, 1, slice(0, 1)),
}


def same(maps, expected):
    scale = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(maps.flatten(-2) / scale, expected / scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize("identity", ["transmm", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_vanilla_equals_the_matrix_form(name, identity):
    options, prefix, pooled = MODELS[name]
    model = tiny_vit(**options)
    images = torch.randn(3, 3, *model.patch_embed.img_size, dtype=torch.float64)
    result = fastfg.attribute(model, images, identity=identity)
    assert result.maps.shape == (3, *model.patch_embed.grid_size)
    same(result.maps, oracle(model, images, identity=identity, prefix=prefix, pooled=pooled))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("identity", ["transmm", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_gated_equals_the_matrix_form(name, identity, kind):
    options, prefix, pooled = MODELS[name]
    model = tiny_vit(**options)
    images = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    saes = {block: random_sae(32, 100, "topk", k=9, seed=block) for block in (0, 2, 3)}
    # After the last LayerNorm, a patch's gradient is orthogonal to its residual: g . x is rounding noise at block 2
    layers = (0, 1) if kind["score"] == "gradient_x_residual" else (0, 2, 3)
    gate = fastfg.Gate(layers=layers, kappa=0.8, c_max=20.0, **kind)
    result = fastfg.attribute(model, images, saes=saes, gate=gate, identity=identity)
    same(result.maps, oracle(model, images, gate, saes, identity, prefix, pooled))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scores_and_gates_of_every_kind_of_sae(model, images, activation, normalize, rescale):
    sae = random_sae(32, 100, activation, normalize=normalize, **ACTIVATIONS[activation])
    gates = [fastfg.Gate((1,), rescale=rescale and kind["score"] != "gradient_x_residual", **kind) for kind in KINDS]
    result = fastfg.attribute(model, images, saes={1: sae}, gate=gates)
    _, _, _, _, x, g = record(model, images)
    for c, gate in enumerate(gates):
        expected = dense_score(gate, sae, x[1][:, 1:], g[1][:, 1:])
        torch.testing.assert_close(result.scores[1][c], expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
        same(result.maps[c], oracle(model, images, gate, {1: sae}))


def test_equal_scores_leave_the_map_as_it_is(model, images):
    sae = random_sae(32, 100, "relu")
    sae.b_enc.fill_(-1e9)  # no feature is ever active: every score is 0, and so is the MAD
    result = fastfg.attribute(model, images, saes={2: sae}, gate=[None, fastfg.Gate((2,))])
    assert result.gates[2].eq(1).all()
    assert torch.equal(result.maps[0], result.maps[1])


def test_a_list_of_gates_equals_each_alone(model, images, saes):
    gates = [None]
    for layers, kappa, c_max in itertools.product([(1,), (2,), (1, 2)], [0.5, 1.0], [10.0, 50.0]):
        gates.append(fastfg.Gate(layers, kappa, c_max))
    gates.append(fastfg.Gate((1, 2), shuffle_seed=3))
    gates.append(fastfg.Gate((1,), score="gradient_x_residual"))
    together = fastfg.attribute(model, images, saes=saes, gate=gates, features=3)
    assert together.maps.shape == (len(gates), 3, 4, 6)
    for c, gate in enumerate(gates):
        alone = fastfg.attribute(model, images, saes=saes, gate=gate, features=3)
        torch.testing.assert_close(together.maps[c], alone.maps, rtol=1e-12, atol=0)
        for block in alone.gates:
            torch.testing.assert_close(together.gates[block][c], alone.gates[block], rtol=1e-12, atol=0)
            assert torch.equal(together.features[block].indices[c], alone.features[block].indices)


def test_a_block_that_is_not_gated_has_no_score(model, images, saes):
    result = fastfg.attribute(model, images, saes=saes, gate=[None, fastfg.Gate((2,))])
    assert result.scores[2][0].isnan().all()
    assert not result.scores[2][1].isnan().any()
    assert result.gates[2][0].eq(1).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_features_are_the_largest_terms_of_the_score(model, images, activation):
    sae = random_sae(32, 100, activation, **ACTIVATIONS[activation])
    for seed in (None, 5):
        gate = fastfg.Gate((1,), shuffle_seed=seed)
        found = fastfg.attribute(model, images, saes={1: sae}, gate=gate, features=4).features[1]
        _, _, _, _, x, g = record(model, images)
        W_dec = sae.W_dec
        if seed is not None:
            W_dec = W_dec[torch.randperm(100, generator=torch.Generator().manual_seed(seed))]
        terms = sae.encode(x[1][:, 1:]) * (g[1][:, 1:] @ W_dec.T)
        best = terms.abs().sort(dim=-1, descending=True, stable=True).indices[..., :4]
        torch.testing.assert_close(found.values, terms.gather(-1, best), rtol=1e-9, atol=1e-11)
        active = terms.gather(-1, best) != 0
        assert torch.equal(found.indices[active], best[active])


def test_missing_features_are_padded(model, images, saes):
    found = fastfg.attribute(model, images, saes=saes, gate=fastfg.Gate((1,)), features=12).features[1]
    assert found.indices.shape == (3, 24, 12)
    assert (found.indices[..., 9:] == -1).all()
    assert found.values[..., 9:].eq(0).all()


def test_targets(model, images):
    predicted = model(images).argmax(1)
    free = fastfg.attribute(model, images)
    assert torch.equal(free.target, predicted)
    assert torch.equal(fastfg.attribute(model, images, target=predicted.tolist()).maps, free.maps)
    one = fastfg.attribute(model, images, target=3)
    assert one.target.tolist() == [3, 3, 3]
    same(one.maps, oracle(model, images, target=torch.tensor([3, 3, 3])))
    torch.testing.assert_close(one.logits, model(images).detach())


def test_an_image_is_explained_the_same_in_any_batch(model, images, saes, gate):
    together = fastfg.attribute(model, images, saes=saes, gate=gate).maps
    for i in range(3):
        alone = fastfg.attribute(model, images[i : i + 1], saes=saes, gate=gate).maps
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 0.99999), (torch.bfloat16, 0.98), (torch.float16, 0.98)])
def test_precisions(model, images, saes, gate, dtype, close):
    exact = fastfg.attribute(model, images, saes=saes, gate=gate, target=1).maps
    low = {block: sae.to(dtype) for block, sae in saes.items()}
    maps = fastfg.attribute(model.to(dtype), images.to(dtype), saes=low, gate=gate, target=1).maps
    assert maps.dtype == torch.float32
    for ours, reference in zip(maps.double().flatten(1), exact.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([ours, reference]))[0, 1] > close


def test_autocast_inference_mode_and_no_grad(model, images, saes, gate):
    expected = fastfg.attribute(model, images, saes=saes, gate=gate).maps
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(fastfg.attribute(model, images, saes=saes, gate=gate).maps, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fastfg.attribute(
            model.float(), images.float(), saes={b: s.float() for b, s in saes.items()}, gate=gate, target=1
        )
    assert low.maps.dtype == torch.float32
    assert low.maps.isfinite().all()


def test_each_heatmap_is_scaled(model, images):
    result = fastfg.attribute(model, images)
    heat = result.heatmap((32, 48))
    assert heat.shape == (3, 32, 48)
    assert heat.amin((1, 2)).eq(0).all()
    assert heat.amax((1, 2)).eq(1).all()
    result.maps = torch.ones(2, 3, 4, 6)
    assert result.heatmap((8, 12)).eq(0).all()


def state_of(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [b.attn.fused_attn for b in model.blocks],
        model.grad_checkpointing,
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [p.grad for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )


def assert_unchanged(before, after):
    assert before[:-1] == after[:-1]
    assert all(torch.equal(before[-1][k], after[-1][k]) for k in before[-1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_images_are_left_as_they_were(model, images, saes, gate, fails):
    model.train()
    model.blocks[1].eval()
    model.blocks[2].attn.fused_attn = False
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    model.grad_checkpointing = True
    kept = images.clone()
    before = state_of(model)
    if fails:
        with pytest.raises(ValueError, match="target: expected classes"):
            fastfg.attribute(model, images, saes=saes, gate=gate, target=77)
        wrong = {1: random_sae(16, 50, "topk", k=3), 2: saes[2]}
        with pytest.raises(ValueError, match=r"saes\[1\]: expected width 32"):
            fastfg.attribute(model, images, saes=wrong, gate=gate)
    else:
        fastfg.attribute(model, images, saes=saes, gate=gate)
        fastfg.residuals(model, images, [1])
    assert_unchanged(before, state_of(model))
    assert torch.equal(images, kept)
    assert images.grad is None


def test_threads_with_one_model_do_not_mix_nor_restore_too_early(model, images, saes, gate):
    model.train()
    before = state_of(model)
    expected = [fastfg.attribute(model, images[i : i + 1], saes=saes, gate=gate).maps for i in range(3)]
    found, errors = {}, []

    def work(i):
        try:
            for _ in range(5):
                found.setdefault(i, []).append(fastfg.attribute(model, images[i : i + 1], saes=saes, gate=gate).maps)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, maps in found.items():
        assert all(torch.equal(m, expected[i]) for m in maps)
    assert_unchanged(before, state_of(model))


def test_no_attention_map_is_kept(model, images):
    """A block's hook receives q, k, v and dO; nothing of size N x N is kept for the backward pass."""
    sizes = []
    stop = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t)
    with stop:
        fastfg.attribute(model, images)
    assert sizes
    assert not [size for size in sizes if size[-2:] == (25, 25)]


def test_digits_are_explained_as_the_matrix_form_does(digits_model):
    vit, pixels, _ = digits_model
    maps = fastfg.attribute(vit, pixels[:8]).maps
    expected = oracle(vit.double(), pixels[:8].double(), target=fastfg.attribute(vit, pixels[:8].double()).target)
    vit.float()
    torch.testing.assert_close(maps.flatten(1).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_the_digits_model_has_learnt_something(digits_model):
    vit, pixels, labels = digits_model
    with torch.no_grad():
        assert (vit(pixels).argmax(1) == labels).double().mean() > 0.9


@pytest.mark.parametrize("methods", [[], ["gradient_x_input"]])
def test_a_model_that_writes_into_its_input(model, images, methods):
    """The caller's images are left as they are."""
    before, plain = images.clone(), model.forward_features
    expected = fastfg.attribute(model, images * 2, methods=methods)
    model.forward_features = lambda x, **_: plain(x.mul_(2))
    found = fastfg.attribute(model, images, methods=methods)
    assert torch.equal(found.maps, expected.maps)
    fastfg.residuals(model, images, [1])
    assert torch.equal(images, before)
