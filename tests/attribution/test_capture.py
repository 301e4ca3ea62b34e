"""Other methods from the same pass, compiled models, nested calls, early stops, and two models in two threads."""

import threading

import pytest
import torch
import torch.nn.functional as F

import fastfg
from tests.models.families import build, open_clip_tower, timm_vit
from tests.tools import record, tiny_vit


def test_other_methods_of_the_same_pass(model, images):
    _, _, attn, _, _, _ = record(model, images)
    found = fastfg.attribute(model, images, methods=["rollout", "last_attention"]).methods
    R = torch.eye(25, dtype=torch.float64).expand(3, -1, -1)
    for A in attn:
        R = (A.mean(1) + torch.eye(25)) / 2 @ R
    torch.testing.assert_close(found["rollout"].flatten(1), R[:, 0, 1:], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found["last_attention"].flatten(1), attn[-1].mean(1)[:, 0, 1:], rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="methods: expected names among .* got \\['lime'\\]"):
        fastfg.attribute(model, images, methods=["lime"])


def test_other_methods_under_a_pooling_head():
    model = build("timm SigLIP")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    maps = []
    explicit = F.scaled_dot_product_attention

    def keep(q, k, v, **_):
        maps.append(torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1).mean(1).detach())
        return explicit(q, k, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", keep)
        model(images)
    found = fastfg.attribute(model, images, methods=["rollout", "last_attention"]).methods
    torch.testing.assert_close(found["last_attention"].flatten(1), maps[-1][:, 0])
    row = maps[-1]
    for A in reversed(maps[:-1]):
        row = row @ (A + torch.eye(16)) / 2
    torch.testing.assert_close(found["rollout"].flatten(1), row[:, 0])


@pytest.mark.parametrize("name", ["timm prr", "open_clip"])
def test_the_last_attention_of_the_queries_that_are_read(name):
    """Both heads have several queries, and the logits depend on the first one."""
    torch.manual_seed(0)
    if name == "timm prr":
        model = timm_vit(global_pool="prr").double().eval()
        head, target = model.attn_pool, None
    else:
        model = open_clip_tower(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=5).double().eval()
        head, target = model.attn_pool.attn, lambda embedding: embedding[:, 1]
    images, maps = torch.randn(2, 3, 32, 32, dtype=torch.float64), []

    def attend(q, k, v, *_, **__):
        maps.append(torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1))
        return maps[-1] @ v

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        head.register_forward_pre_hook(lambda *_: maps.clear())
        patch.setattr(F, "scaled_dot_product_attention", attend)
        head.training = True  # as multi-head attention then takes no fast path
        model(images)
        head.training = False
    expected = maps[0].mean(1)[:, 0, 1:]
    found = fastfg.attribute(model, images, target=target, methods=["last_attention"]).methods["last_attention"]
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("methods", [[], ["rollout"]])
@pytest.mark.parametrize("change", ["an added key", "every second key"])
def test_a_pooling_head_over_other_keys(change, methods):
    model, images = build("timm SigLIP"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    other = (lambda x: F.pad(x, (0, 0, 1, 0))) if change == "an added key" else (lambda x: x[:, ::2])
    model.attn_pool.register_forward_pre_hook(lambda module, given: (other(given[0]), *given[1:]))
    keys = 17 if change == "an added key" else 8
    with pytest.raises(RuntimeError, match=f"head to read all 16 tokens or the 16 patches, met {keys} keys"):
        fastfg.attribute(model, images, methods=methods)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "blocks"])
def test_compiled_models(images, how):
    model = tiny_vit()
    expected = fastfg.attribute(model, images, gate=fastfg.Gate((0, 1), score="gradient_x_residual"))
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "model.compile":
        model.compile(backend="aot_eager")
    else:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="aot_eager")
    with torch.no_grad():
        compiled(images)  # compiled before it is explained
    found = fastfg.attribute(compiled, images, gate=fastfg.Gate((0, 1), score="gradient_x_residual"))
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-10, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected.logits)


def test_a_call_inside_a_call(model, images):
    """A user's hook may explain another model, or the same one, in the middle of a forward pass.

    With such a hook the last block runs in full, so the outer maps are the same to rounding.
    """
    other = tiny_vit(seed=5)
    expected, inner_expected = fastfg.attribute(model, images).maps, fastfg.attribute(other, images).maps
    gated = fastfg.attribute(model, images, gate=fastfg.Gate((1,), score="gradient_x_residual")).maps
    inner = []
    handle = model.blocks[1].register_forward_hook(lambda m, i, o: inner.append(fastfg.attribute(other, images).maps))
    found = fastfg.attribute(model, images).maps
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.equal(inner[0], inner_expected)
    stream = fastfg.residuals(model, images, [0])[0]

    def same_model(*_):
        handle.remove()
        inner.extend([fastfg.attribute(model, images).maps, fastfg.residuals(model, images, [0])[0]])

    handle = model.blocks[1].register_forward_hook(same_model)
    found = fastfg.attribute(model, images, gate=fastfg.Gate((1,), score="gradient_x_residual")).maps
    torch.testing.assert_close(found, gated, rtol=1e-12, atol=0)
    assert torch.equal(inner[1], expected)
    assert torch.equal(inner[2], stream)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_early_stops_leave_nothing_behind(model, images, where):
    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    def stop_backward(module, inputs, output):
        output.register_hook(stop)

    model.train()
    hook = stop if where == "forward" else stop_backward
    handle = model.blocks[2].register_forward_hook(hook)
    with pytest.raises(StopError):
        fastfg.attribute(model, images, gate=fastfg.Gate((1,), score="gradient_x_residual"))
    handle.remove()
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.overrides._get_current_function_mode() is None
    assert fastfg.attribute(model, images).maps.isfinite().all()


@pytest.mark.parametrize("names", [("timm ViT", "torchvision ViT"), ("transformers ViT", "vit-prisma HookedViT")])
def test_two_threads_with_two_models_do_not_mix(names):
    models = [build(name) for name in names]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = [fastfg.attribute(model, images).maps for model in models]
    meet, wrong = threading.Barrier(2), []

    def work(model, maps):
        meet.wait()
        for _ in range(10):
            if not torch.equal(fastfg.attribute(model, images).maps, maps):
                wrong.append(model)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_a_large_tile_and_a_small_one_are_the_same(model, images, monkeypatch):
    import sys

    expected = fastfg.attribute(model, images, methods=["rollout"])
    monkeypatch.setattr(sys.modules["fastfg.reference.relevancy"], "TILE", 3 * 4 * 25 * 4)  # four queries at a time
    found = fastfg.attribute(model, images, methods=["rollout"])
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.methods["rollout"], expected.methods["rollout"], rtol=1e-12, atol=0)


def test_masked_attention_is_refused(model, images):
    block = model.blocks[1]
    plain = block.forward
    block.forward = lambda x: plain(x, is_causal=True)
    with pytest.raises(ValueError, match="expected plain self-attention in every block, got is_causal=True"):
        fastfg.attribute(model, images)


def test_parameters_and_layers_before_the_first_attention_get_no_gradients(model, images):
    reached = []
    for name, module in model.named_modules():
        if name in ("patch_embed.proj", "blocks.0.norm1", "blocks.0.attn.qkv"):
            module.register_forward_hook(lambda m, i, o, name=name: reached.append((name, o.requires_grad)))
    fastfg.attribute(model, images)
    assert reached == [("patch_embed.proj", False), ("blocks.0.norm1", False), ("blocks.0.attn.qkv", False)]
    assert all(p.grad is None for p in model.parameters())
