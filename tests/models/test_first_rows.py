"""The last block runs only for the tokens that the head reads, and every other use of its tokens runs it in full."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastfg
from fastfg.models import adapt, first_rows
from fastfg.models.first_rows import FirstRows
from tests.models.families import FAMILIES
from tests.models.test_families import setup

CUT = [
    "timm ViT",
    "timm ViT, registers",
    "timm ViT, wide image",
    "timm DeiT, distilled",
    "timm DINOv2",
    "timm DINOv2, registers",
    "timm EVA, class token",
    "timm CLIP",
    "transformers ViT",
    "transformers DeiT",
    "transformers DeiT, teacher",
    "zero-shot over transformers' CLIPVisionModel",
    "zero-shot over transformers' CLIP with projection",
    "zero-shot over a timm tower",
]


@pytest.fixture
def passes(monkeypatch):
    """A list that gets an entry for each forward pass: whether it is of the first rows, and succeeds."""
    found = []
    leave, check = FirstRows.__exit__, FirstRows.check

    def left(self, *exception):
        leave(self, *exception)
        if exception[0] is not None:
            found.append(False)

    def checked(self, *given):
        found.append(False)
        check(self, *given)
        found[-1] = bool(self.held)

    monkeypatch.setattr(FirstRows, "__exit__", left)
    monkeypatch.setattr(FirstRows, "check", checked)
    return found


def in_full(monkeypatch, *given, **options):
    with monkeypatch.context() as patch:
        patch.setattr(first_rows, "hooks_of", lambda model: [print])
        return fastfg.attribute(*given, **options)


def assert_alike(found, expected):
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    scale = expected.maps.abs().amax()
    assert float((found.maps - expected.maps).abs().max() / scale) < 1e-12


@pytest.mark.parametrize("identity", ["transmm", "paper"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_maps_are_those_of_the_whole_block(name, identity, passes, monkeypatch):
    model, saes, images = setup(name)
    options = {"saes": saes, "gate": [None, fastfg.Gate((0, 1))], "identity": identity}
    options["methods"] = ["rollout", "last_attention", "gradient_x_input"]
    found = fastfg.attribute(model, images, **options)
    assert passes == [True] * (name in CUT)
    expected = in_full(monkeypatch, model, images, **options)
    assert len(passes) == (name in CUT)
    assert_alike(found, expected)
    for method in options["methods"]:
        torch.testing.assert_close(found.methods[method], expected.methods[method], rtol=1e-9, atol=1e-12)


class Multiplied(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_it_saves_work(model, images, monkeypatch):
    fastfg.attribute(model, images)  # the first time, the output is compared with that of the model in full
    with Multiplied() as some:
        fastfg.attribute(model, images)
    with Multiplied() as everything:
        in_full(monkeypatch, model, images)
    B, N, d = len(images), 25, 32
    after_attention = d * d + 2 * 4 * d * d  # per token: the projection, and an MLP of width 4 d
    assert everything.total - some.total == 2 * B * (N - 1) * after_attention  # forward and backward


def test_a_last_block_whose_tokens_are_needed_runs_in_full(model, images, passes):
    fastfg.attribute(model, images, gate=fastfg.Gate((3,), score="gradient_x_residual"))
    fastfg.attribute(model, images, target=lambda logits: logits[:, 0])
    assert passes == []
    fastfg.attribute(model, images, gate=fastfg.Gate((2,), score="gradient_x_residual"))
    assert passes == [True]


class Centred(torch.nn.Module):
    """Reads all tokens, out of sight of a mode once it is scripted."""

    def forward(self, x):
        return x - x.mean(dim=1, keepdim=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_model_that_gets_another_part_is_compared_again(model, images, passes):
    fastfg.attribute(model, images)
    model.norm = torch.jit.script(Centred())
    with pytest.raises(RuntimeError, match="expected the head of .* to read the tokens"):
        fastfg.attribute(model, images)


def test_hooks_of_the_user_see_all_tokens(model, images, passes):
    seen = []
    handle = model.norm.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    expected = fastfg.attribute(model, images)
    assert seen == [25]
    assert passes == []
    handle.remove()
    for register in (model.blocks[3].register_full_backward_hook, torch.nn.modules.module.register_module_forward_hook):
        handle = register(lambda *_: None)
        fastfg.attribute(model, images)
        assert passes == []
        handle.remove()
    assert_alike(fastfg.attribute(model, images), expected)
    assert passes == [True]


def mean_inside(x, block):
    x = x + block.attn(block.norm1(x))
    return x + x.mean(1, keepdim=True)


def in_place(x, block):
    attended = block.attn(block.norm1(x))
    attended *= 2
    return x + attended


def a_convolution(x, block):
    x = x + block.attn(block.norm1(x))
    return x + F.avg_pool1d(x.mT, 3, 1, 1).mT


def attention_twice(x, block):
    return x + block.attn(block.norm1(x)) + 0 * block.mlp(x)[:, :1]


class Sums(torch.autograd.Function):
    """Adds up the tokens. No mode sees the call of such a function."""

    @staticmethod
    def forward(ctx, x):
        ctx.n = x.shape[1]
        return x.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        return g.expand(-1, ctx.n, -1)


def own_function(x, block):
    x = x + block.attn(block.norm1(x))
    return x + Sums.apply(x)


@torch.jit.script
def scripted_scale(x):
    return x * torch.sigmoid(x.mean(1, keepdim=True))


def scripted(x, block):
    return scripted_scale(x + block.attn(block.norm1(x)))


def mapped(x, block):
    x = x + block.attn(block.norm1(x))
    return torch.vmap(lambda tokens: tokens - tokens.mean(0))(x)


def error_caught(x, block):
    x = x + block.attn(block.norm1(x))
    try:
        return x + x.mean(1, keepdim=True)
    except Exception:
        return x


def gradient_clipped(x, block):
    x = x + block.attn(block.norm1(x))
    x.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return x + block.mlp(block.norm2(x))


USES = [mean_inside, in_place, a_convolution, attention_twice, own_function, scripted, mapped, error_caught]
USES += [gradient_clipped]


@pytest.mark.parametrize("forward", USES, ids=lambda f: f.__name__)
def test_a_block_that_uses_its_tokens_otherwise(model, images, forward, passes, monkeypatch):
    block = model.blocks[3]
    block.forward = lambda x: forward(x, block)
    found = fastfg.attribute(model, images)
    assert passes == [forward is attention_twice]
    assert_alike(found, in_full(monkeypatch, model, images))
    passes.clear()
    fastfg.attribute(model, images)  # the second time it is known
    assert passes == ([True] if forward is attention_twice else [])


@pytest.mark.parametrize("read", ["last", "comparison"])
def test_a_head_that_reads_another_token_in_any_way_is_run_in_full(model, images, read, passes):
    """Even where no gradient tells: the values of the other tokens are the model's own."""

    def pool(x, **_):
        other = x[:, -1] if read == "last" else torch.where(x[:, 3] > 0, 2.0, 1.0)
        return model.head(x[:, 0] * other.detach())

    model.forward_head = pool
    found = fastfg.attribute(model, images)
    assert passes == [False]
    torch.testing.assert_close(found.logits, model(images).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("store", ["attribute", "list", "dict"])
def test_tokens_that_the_model_stores_are_all_there(model, images, store, passes):
    plain, stored = model.norm.forward, []

    def forward(x):
        tokens = plain(x)
        stored[:] = [tokens]
        model.seen = {"attribute": tokens, "list": [tokens], "dict": {"tokens": tokens}}[store]
        return tokens

    model.norm.forward = forward
    for _ in range(2):
        fastfg.attribute(model, images)
        assert stored[0].shape[1] == 25
    assert passes == [False]


def test_a_target_that_reads_other_tokens_of_an_object(passes):
    model, _, images = setup("transformers ViT")
    bare = model.vit
    adapter = dataclasses.replace(adapt(model), model=bare, forward=lambda x: bare(pixel_values=x))
    of = torch.randn(48, dtype=torch.float64)
    first = fastfg.Target.similarity(of, output=lambda output: output.last_hidden_state[:, 0])
    fastfg.attribute(adapter, images, target=first)
    assert passes == [True]
    mean = fastfg.Target.similarity(of, output=lambda output: output.last_hidden_state.mean(1))
    with pytest.raises(RuntimeError, match=r"expected the head of ViTModel to read the tokens \[0\]"):
        fastfg.attribute(adapter, images, target=mean)
    assert passes == [True, False]


def test_wrong_arguments_run_one_forward(model, images, passes):
    fastfg.attribute(model, images)
    passes.clear()
    with pytest.raises(ValueError, match="target: expected classes"):
        fastfg.attribute(model, images, target=77)
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("pooled", "n_rows"),
    [
        ((slice(0, 1),), 1),
        ((slice(None, 2),), 2),
        ((slice(0, 1), slice(1, 3)), 3),
        ((slice(0, None),), None),
        ((slice(3, 5),), None),
        ((slice(0, -5),), None),
        ((slice(-1, None),), None),
        ((), None),
    ],
)
def test_how_many_rows_the_head_reads(model, pooled, n_rows):
    adapter = dataclasses.replace(adapt(model), pooled=pooled, num_prefix_tokens=3)
    assert adapter.n_rows == n_rows
