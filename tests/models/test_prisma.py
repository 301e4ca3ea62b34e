"""vit-prisma's HookedViT: the same logits as through timm, and relevancy from its own recorded patterns."""

import dataclasses

import pytest
import torch

import fastfg
from fastfg import reference
from fastfg.models import adapt
from fastfg.models.timm import import_timm
from tests.tools import random_sae

import_timm()
pytest.importorskip("vit_prisma", reason="needs the extra [prisma]")


def hooked_vit(**options):
    from vit_prisma.configs.HookedViTConfig import HookedViTConfig
    from vit_prisma.models.base_vit import HookedViT

    torch.manual_seed(0)
    shape = {"n_layers": 4, "d_model": 48, "d_head": 12, "d_mlp": 96, "n_heads": 4, "n_classes": 7}
    shape |= {"image_size": 40, "patch_size": 8, "return_type": "class_logits", "dtype": torch.float64}
    config = HookedViTConfig(**(shape | options))
    model = HookedViT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def recorded(hooked, images, target):
    """Patterns, residual streams and their gradients, from HookedViT's own hook points."""
    kept = {}

    def keep(tensor, hook):
        tensor.retain_grad()
        kept[hook.name] = tensor

    names = ("attn.hook_pattern", "hook_resid_post")
    hooks = [(f"blocks.{block}.{name}", keep) for block in range(hooked.cfg.n_layers) for name in names]
    logits = hooked.run_with_hooks(images, fwd_hooks=hooks)
    logits.gather(1, target[:, None]).sum().backward()

    def read(name):
        tensors = [kept[f"blocks.{block}.{name}"] for block in range(hooked.cfg.n_layers)]
        return [t.detach() for t in tensors], [t.grad for t in tensors]

    return logits.detach(), *read("attn.hook_pattern"), *read("hook_resid_post")


@pytest.mark.parametrize("options", [{}, {"layer_norm_pre": True}, {"activation_name": "gelu_new"}], ids=str)
def test_relevancy_of_hookedvits_own_patterns(options):
    from tests.models.to_timm import to_timm

    hooked = hooked_vit(**options)
    model = to_timm(hooked)
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    target = torch.tensor([3, 0])
    logits, attn, dattn, x, g = recorded(hooked, images, target)
    torch.testing.assert_close(model(images), logits, rtol=1e-10, atol=1e-10)

    gate = fastfg.Gate(layers=(1, 2), kappa=1.0, c_max=50.0)
    saes = {block: random_sae(48, 200, "topk", k=16, seed=block) for block in (1, 2)}
    gates = []
    for block in range(4):
        w = torch.ones(2, 26, dtype=torch.float64)
        if block in saes:
            scores = reference.project_dense(g[block][:, 1:], saes[block].W_dec, saes[block].encode(x[block][:, 1:]))
            w[:, 1:] = reference.gate(scores, 1.0, 50.0)
        gates.append(w)
    for which, expected_gates in ((None, [None] * 4), (gate, gates)):
        maps = fastfg.attribute(model, images, saes=saes, gate=which, target=target).maps
        expected = reference.relevancy_matrix(attn, dattn, expected_gates)[:, 0, 1:]
        torch.testing.assert_close(maps.flatten(1), expected, rtol=1e-9, atol=1e-12)


def test_variants_without_a_counterpart_are_refused():
    from tests.models.to_timm import to_timm

    with pytest.raises(ValueError, match=r"hooked.cfg.attn_only: expected False, got True"):
        to_timm(hooked_vit(attn_only=True))
    with pytest.raises(ValueError, match=r"hooked.cfg.activation_name: expected one of .* got 'gelu_fast'"):
        to_timm(hooked_vit(activation_name="gelu_fast"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_hook_that_changes_the_attention(dtype):
    """Relevancy is computed from q and k, so a changed pattern would be ignored."""
    model = hooked_vit(dtype=dtype).to(dtype)
    images = torch.randn(2, 3, 40, 40, dtype=dtype)
    assert fastfg.attribute(model, images).maps.isfinite().all()

    def ablate(pattern, hook):
        pattern = pattern.clone()
        pattern[..., 3] = 0
        return 2 * pattern

    with (
        model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", ablate)]),
        pytest.raises(
            RuntimeError, match=r"expected the attention in block 2 of HookedViT to be softmax\(0.288675 q k"
        ),
    ):
        fastfg.attribute(model, images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_adapter_that_reports_another_scale(dtype):
    model = hooked_vit(dtype=dtype).to(dtype)
    images = torch.randn(2, 3, 40, 40, dtype=dtype)
    adapter = adapt(model)

    class Wrong:
        def __init__(self, capture):
            self.capture = capture

        def meet(self, q, k, v, out, scale, transposed=False):
            return self.capture.meet(q, k, v, out, 3 * scale, transposed)

    wrong = dataclasses.replace(adapter, meet=lambda capture: adapter.meet(Wrong(capture)))
    with pytest.raises(RuntimeError, match=r"expected the attention in block 0 .* softmax\(0.866025 q k"):
        fastfg.attribute(wrong, images)
