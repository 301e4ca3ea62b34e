"""The private parts of torch that fastfg uses still work as fastfg needs."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from fastfg import torch_internals


def test_this_torch_version_was_tested():
    if not torch.__version__.startswith(torch_internals.TRIED_ON):
        warnings.warn(f"torch {torch.__version__} is not one of {torch_internals.TRIED_ON}", stacklevel=1)
    assert all(version.count(".") == 1 for version in torch_internals.TRIED_ON)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "a part"])
def test_compiled_models_are_known(how):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert not torch_internals.is_compiled(model.modules())
    assert torch_internals.uncompiled(model) is model
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
        assert torch_internals.uncompiled(compiled) is model
    elif how == "model.compile":
        model.compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    assert torch_internals.is_compiled(compiled.modules())


def test_attention_inside_multi_head_attention_is_replaced():
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected, _ = module(x, x, x, need_weights=False)
    seen, original = [], F.multi_head_attention_forward

    def attention(q, k, v, *args, **kwargs):
        seen.append(tuple(q.shape))
        return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F,
            "multi_head_attention_forward",
            lambda *given, **named: run(original, attention, *given, **named),
        )
        found, weights = module(x, x, x)
    assert seen == [(2, 2, 5, 4)]
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def run(original, attention, *given, **named):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "multi_head_attention_forward", original)
        return torch_internals.multi_head_attention_forward(attention, *given, **named)


def test_a_marked_function_runs_once_and_its_result_is_a_constant():
    calls = []

    @torch_internals.constant_when_traced
    def number():
        calls.append(None)
        return 3

    compiled = torch.compile(lambda x: x * number(), backend="eager", fullgraph=True)
    for _ in range(2):
        assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
    assert len(calls) == 1


def test_all_kinds_of_hooks_are_found():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert torch_internals.hooks_of(model) == []
    part, everywhere = model[0], torch.nn.modules.module
    for register in (
        part.register_forward_hook,
        part.register_forward_pre_hook,
        part.register_full_backward_hook,
        part.register_full_backward_pre_hook,
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ):
        handle = register(print)
        assert torch_internals.hooks_of(model) == [print]
        handle.remove()
    assert torch_internals.hooks_of(model) == []


def test_tensors_that_are_saved_elsewhere():
    assert not torch_internals.saves_elsewhere()
    with torch.autograd.graph.save_on_cpu():
        assert torch_internals.saves_elsewhere()
