"""Every block must run once, in order, with one attention of its own over all tokens; anything else is an error."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastfg
from fastfg.models import adapt
from tests.attribution.test_attribute import assert_unchanged, state_of

GATES = {"vanilla": None, "gated": fastfg.Gate((1,), score="gradient_x_residual")}


def run_blocks(model, run):
    """``model``, with its blocks run by ``run(blocks, x)``."""

    class Blocks(torch.nn.Sequential):
        def forward(self, x):
            return run(list(self), x)

    model.blocks = Blocks(*model.blocks)
    return model


def by_forward(blocks, x):
    for block in blocks:
        x = block.forward(x)
    return x


def in_reverse(blocks, x):
    for block in reversed(blocks):
        x = block(x)
    return x


def one_twice(blocks, x):
    for block in (blocks[0], blocks[1], blocks[1], blocks[2], blocks[3]):
        x = block(x)
    return x


def one_twice_another_not_at_all(blocks, x):
    for block in (blocks[0], blocks[1], blocks[1], blocks[3]):
        x = block(x)
    return x


def in_parallel(blocks, x):
    x = blocks[0](x)
    return blocks[3](blocks[1](x) + blocks[2](x))


def one_unread(blocks, x):
    x = blocks[0](x)
    blocks[1](x)
    return blocks[3](blocks[2](x))


def with_a_stop(blocks, x):
    x = blocks[1](blocks[0](x))
    return blocks[3](blocks[2](x.detach()))


def without_gradients(blocks, x):
    with torch.no_grad():
        return in_order(blocks, x)


def in_order(blocks, x):
    for block in blocks:
        x = block(x)
    return x


UNREAD = "expected block 2 of VisionTransformer to read the output of block 1, which ran before it; it does not"
RUNS = {
    by_forward: r"expected VisionTransformer to run its 4 blocks once each and in order, but it ran \[\]",
    in_reverse: r"in order, but it ran \[3, 2, 1, 0\]",
    one_twice: r"in order, but it ran \[0, 1, 1, 2, 3\]",
    one_twice_another_not_at_all: r"in order, but it ran \[0, 1, 1, 3\]",
    in_parallel: UNREAD,
    one_unread: UNREAD,
    with_a_stop: UNREAD,
    without_gradients: "gradients to flow through VisionTransformer, but they stop before its attention number 1",
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_blocks_that_do_not_run_once_in_order(model, images, run, gate):
    model = run_blocks(model, run)
    before = state_of(model)
    with pytest.raises(RuntimeError, match=RUNS[run]):
        fastfg.attribute(model, images, gate=gate)
    assert_unchanged(before, state_of(model))


def test_one_module_as_several_blocks(model, images):
    model.blocks[2] = model.blocks[1]
    with pytest.raises(RuntimeError, match=r"expected 4 distinct blocks in VisionTransformer, got \[2\] twice"):
        fastfg.attribute(model, images)


def attention_elsewhere(model):
    """Block 1 attends twice and block 2 not at all: as many attentions as there are blocks."""
    plain, attend = model.blocks[1].forward, model.blocks[1].attn
    model.blocks[1].forward = lambda x: plain(x) + attend(x)
    model.blocks[2].attn = torch.nn.Identity()
    model.blocks[2].forward = lambda x: x + model.blocks[2].mlp(x)


def attention_skipped(model):
    model.blocks[2].forward = lambda x: x


def attention_over_some_tokens(model):
    plain = model.blocks[2].attn.forward
    model.blocks[2].attn.forward = lambda x, **_: F.pad(plain(x[:, :9]), (0, 0, 0, x.shape[1] - 9))


def attention_in_windows(model):
    plain = model.blocks[2].attn.forward
    model.blocks[2].attn.forward = lambda x, **_: plain(x.repeat(2, 1, 1)).chunk(2)[0]


def attention_outside(model):
    def attend(module, given):
        q = given[0].unflatten(-1, (4, 8)).transpose(1, 2)
        return (F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2),)

    model.norm.register_forward_pre_hook(attend)


def tokens_dropped(model):
    plain = model.blocks[2].forward
    model.blocks[2].forward = lambda x: plain(x)[:, :9]


def block_in_a_block(model):
    plain = model.blocks[1].forward
    model.blocks[1].forward = lambda x: plain(model.blocks[2](x))


CHANGES = {
    attention_elsewhere: r"in each of its 4 blocks and 0 after them, met 4, in blocks \[0, 1, 1, 3\]",
    attention_skipped: r"in each of its 4 blocks and 0 after them, met 3, in blocks \[0, 1, 3\]",
    attention_over_some_tokens: "expected 25 tokens in block 2, met 9",
    attention_in_windows: r"expected queries \[3, H, 25, dh\] in block 2",
    attention_outside: "after them, met 5, in blocks .*outside of them",
    tokens_dropped: r"expected the output of block 2 to be \[3, 25, d\], got \[3, 9, 32\]",
    block_in_a_block: "expected VisionTransformer to run one block after another, but it ran block 2 inside block 1",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_attention_that_is_not_one_per_block(model, images, change):
    change(model)
    with pytest.raises(RuntimeError, match=CHANGES[change]):
        fastfg.attribute(model, images)


def test_a_gated_block_whose_output_is_not_read(model, images):
    """The next block reads a value that block 1 stored, not the output of block 1."""
    plain, stored = model.blocks[1].forward, []

    def forward(x):
        stored.append(plain(x))
        return stored[-1] * 1

    model.blocks[1].forward = forward
    following = model.blocks[2].forward
    model.blocks[2].forward = lambda x: following(stored.pop())
    with pytest.raises(
        RuntimeError, match="expected the target to depend on the output of block 1 of VisionTransformer"
    ):
        fastfg.attribute(model, images, gate=GATES["gated"])


def test_a_target_that_does_not_depend_on_every_block(model, images):
    stored = []
    model.blocks[1].register_forward_hook(lambda module, given, output: stored.append(output))
    with pytest.raises(
        RuntimeError, match="reach the attention of block 3 next, but it reached that of block 1: the target"
    ):
        fastfg.attribute(model, images, target=lambda _: stored[0][:, 0, 0])


def test_operations_between_the_blocks(model, images):
    expected = fastfg.attribute(model, images, gate=GATES["gated"]).maps

    def run(blocks, x):
        for block in blocks:
            x = block((x * 2).flip(0).flip(0) / 2)
        return x

    found = fastfg.attribute(run_blocks(model, run), images, gate=GATES["gated"]).maps
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_a_block_that_is_also_given_another_tensor(model, images):
    """The stream need not be the first argument of a block."""
    expected = fastfg.attribute(model, images, gate=GATES["gated"]).maps
    for block in model.blocks:
        block.forward = lambda scale, x, plain=block.forward: plain(x * scale)

    def run(blocks, x):
        for block in blocks:
            x = block(torch.ones(32, dtype=x.dtype), x)
        return x

    assert torch.equal(fastfg.attribute(run_blocks(model, run), images, gate=GATES["gated"]).maps, expected)


def test_a_block_output_that_is_changed_in_place(model, images, saes, gate):
    shift = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def in_place(blocks, x):
        for block in blocks:
            x = block(x)
            x += shift
        return x

    def out_of_place(blocks, x):
        for block in blocks:
            x = block(x) + shift
        return x

    found = fastfg.attribute(run_blocks(model, in_place), images, saes=saes, gate=gate)
    expected = fastfg.attribute(run_blocks(model, out_of_place), images, saes=saes, gate=gate)
    assert torch.equal(found.scores[1], expected.scores[1])
    assert torch.equal(found.maps, expected.maps)


HEADS = {
    "avg": (
        lambda x: x[:, 1:].mean(1),
        r"to read the tokens \[0\], .* depends on the tokens \[1, 2, 3, 4, 5, 6, 7, 8, ...\]",
    ),
    "another token": (lambda x: x[:, 3], r"to read the tokens \[0\], .* depends on the tokens \[3\]"),
    "one more token": (lambda x: x[:, 0] + x[:, 3], r"to read the tokens \[0\], .* depends on the tokens \[0, 3\]"),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_reads_other_tokens_than_the_adapter_says(model, images, head):
    pool, message = HEADS[head]
    model.forward_head = lambda x, **_: model.head(pool(x))
    with pytest.raises(RuntimeError, match=message):
        fastfg.attribute(model, images)


def test_a_head_that_reads_fewer_tokens_than_the_adapter_says(model, images):
    adapter = dataclasses.replace(adapt(model), pooled=(slice(0, 2),))
    with pytest.raises(RuntimeError, match=r"to read the tokens \[0, 1\], .* depends on the tokens \[0\]"):
        fastfg.attribute(adapter, images)


def test_a_head_without_weights_has_a_map_of_zeros(model, images):
    model.head.weight.data.zero_()
    assert (fastfg.attribute(model, images).maps == 0).all()


def test_a_failed_pass_leaves_nothing_in_memory(model, images):
    outputs = []
    model.blocks[2].register_forward_hook(lambda module, given, output: outputs.append(weakref.ref(output)))
    with pytest.raises(ValueError, match="target: expected classes"):
        fastfg.attribute(model, images, gate=GATES["gated"], target=77)
    gc.collect()
    assert [output() for output in outputs] == [None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_checkpointed_blocks_give_the_right_map_or_an_error(model, images, first, reentrant):
    gate = GATES["gated"]
    expected = fastfg.attribute(model, images, gate=gate).maps

    def run(blocks, x):
        for i, block in enumerate(blocks):
            x = block(x) if i < first else checkpoint(block, x, use_reentrant=reentrant)
        return x

    model = run_blocks(model, run)
    if not reentrant and first:
        torch.testing.assert_close(fastfg.attribute(model, images, gate=gate).maps, expected, rtol=1e-12, atol=0)
    else:
        with pytest.raises(RuntimeError):
            fastfg.attribute(model, images, gate=gate)


def checkpointed_inside(model):
    for block in model.blocks:
        block.forward = lambda x, plain=block.forward: checkpoint(plain, x, use_reentrant=False)


def with_an_inference_tensor(model):
    with torch.inference_mode():
        cache = torch.ones(32, dtype=torch.float64)
    model.blocks[1].register_forward_hook(lambda module, given, output: output * cache)


def attention_written_into(model, block):
    attn = model.blocks[block].attn

    def forward(x, **_):
        q, k, v = attn.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        out *= 2
        return attn.proj(out.transpose(1, 2).flatten(2))

    attn.forward = forward


AUTOGRAD = {
    checkpointed_inside: "expected VisionTransformer to run without activation checkpointing",
    with_an_inference_tensor: "but VisionTransformer uses one that was made under torch.inference_mode",
    lambda model: attention_written_into(model, 0): "expected VisionTransformer to leave tensors as they are",
    lambda model: attention_written_into(model, 2): "expected VisionTransformer to leave tensors as they are",
}


@pytest.mark.parametrize("change", AUTOGRAD)
def test_autograds_errors_are_named(model, images, change):
    change(model)
    with pytest.raises(RuntimeError, match=f"model: .*{AUTOGRAD[change]}"):
        fastfg.attribute(model, images, gate=GATES["gated"])


def test_an_adapter_whose_meet_fails_leaves_nothing_behind(model, images):
    def meet(capture):
        yield model.blocks[0].attn.register_forward_hook(lambda *_: None)
        raise LookupError("no attention here")

    before = state_of(model)
    with pytest.raises(LookupError, match="no attention here"):
        fastfg.attribute(dataclasses.replace(adapt(model), meet=meet), images)
    assert_unchanged(before, state_of(model))
    assert torch.overrides._get_current_function_mode() is None
    assert fastfg.attribute(model, images).maps.isfinite().all()


def test_a_model_made_in_inference_mode(model, images):
    with torch.inference_mode():
        made = type(model)(img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5).double()
    before = [p.requires_grad for p in made.parameters()]
    with pytest.raises(ValueError, match="model: expected weights that gradients .* cls_token made under torch.infer"):
        fastfg.attribute(made, images)
    assert [p.requires_grad for p in made.parameters()] == before
    assert made.training


def test_residuals_of_blocks_that_are_not_called(model, images):
    with pytest.raises(RuntimeError, match=r"to call its blocks as modules, block\(x\), but it did not call \[0, 2\]"):
        fastfg.residuals(run_blocks(model, by_forward), images, [0, 2])


def test_residuals_of_blocks_that_run_twice_or_out_of_order(model, images):
    with pytest.raises(RuntimeError, match=r"blocks once each and in order, but it ran \[0, 1, 1, 2, 3\]"):
        fastfg.residuals(run_blocks(copy.deepcopy(model), one_twice), images, [1])
    with pytest.raises(RuntimeError, match=r"blocks once each and in order, but it ran \[3, 2, 1, 0\]"):
        fastfg.residuals(run_blocks(copy.deepcopy(model), in_reverse), images, [1])
    model.blocks[2] = model.blocks[1]
    with pytest.raises(RuntimeError, match=r"expected 4 distinct blocks in VisionTransformer, got \[2\] twice"):
        fastfg.residuals(model, images, [1])


def test_residuals_of_a_model_whose_prefix_is_not_the_adapters(model, images):
    adapter = dataclasses.replace(adapt(model), num_prefix_tokens=3)
    with pytest.raises(RuntimeError, match=r"expected the output of block 1 to be \[3, 27, d\], got \[3, 25, 32\]"):
        fastfg.residuals(adapter, images, [1])


@pytest.mark.parametrize(
    ("patch_size", "grid"), [((8, 8), (6, 4)), ((8, 8), (3, 6)), ((8, 8), (4, 7)), (None, (5, 6)), (None, (0, 6))]
)
def test_an_adapter_whose_grid_does_not_fit(model, images, patch_size, grid):
    adapter = dataclasses.replace(adapt(model), grid=lambda size: grid, patch_size=patch_size)
    for call in (fastfg.attribute, lambda *given: fastfg.residuals(*given, [1])):
        with pytest.raises(ValueError, match=rf"grid: expected .* images of 32 x 48, got \({grid[0]}, {grid[1]}\)"):
            call(adapter, images)


def test_an_adapter_that_pools_no_tokens(model, images):
    adapter = dataclasses.replace(adapt(model), pooled=(slice(40, 50),))
    with pytest.raises(ValueError, match="pooled: expected slices that each contain some of the 25 tokens, got slice"):
        fastfg.attribute(adapter, images)


def test_a_model_without_parameters(model, images):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.complex64)
    with pytest.raises(ValueError, match="model: expected floating-point parameters in VisionTransformer, got none"):
        fastfg.attribute(model, images)
