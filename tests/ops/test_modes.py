"""Every op on every backend: in inference mode, with inputs that require grad, and on empty inputs."""

import pytest
import torch

from fastfg import ops, reference
from fastfg.reference import Activation
from tests.ops.cases import BACKENDS, PAIRS, TYPICAL, cast, device_of, each, outputs
from tests.ops.cases import decode_topk as decode
from tests.ops.cases import encode_project as dense
from tests.ops.cases import encode_topk as topk
from tests.ops.cases import gate as gated
from tests.ops.cases import gated_relevancy as block
from tests.ops.cases import project as sparse
from tests.ops.cases import relevancy as attention


@pytest.fixture
def several_threads():
    """Enough threads that parallel loops use other threads, where the caller's mode is not set."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def same(found, expected):
    for ours, theirs in zip(outputs(found), outputs(expected), strict=True):
        assert not ours.requires_grad
        assert torch.equal(ours, theirs)


def asks_for_a_gradient(_, tensor):
    return tensor.clone().requires_grad_(tensor.is_floating_point())


MODES = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_results_are_the_same_in_every_mode(op, backend, mode):
    """Also with tensors that require grad; the results never do."""
    run, plain = getattr(ops, op), cast(op, TYPICAL[op](), torch.float32, device_of(backend))
    with torch.no_grad():
        expected = run(*plain, backend=backend)
    with MODES[mode]():
        same(run(*each(plain, lambda _, tensor: tensor.clone()), backend=backend), expected)
        same(run(*each(plain, asks_for_a_gradient), backend=backend), expected)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_results_of_inference_tensors_work_outside(op, backend):
    with torch.inference_mode():
        arguments = each(cast(op, TYPICAL[op](), torch.float32, device_of(backend)), lambda _, tensor: tensor.clone())
    for result in outputs(getattr(ops, op)(*arguments, backend=backend)):
        assert not result.is_inference()


EMPTY = {
    "encode_topk": [topk(0, 5, 9, 2)],
    "project": [sparse(0, 5, 9, 2), sparse(3, 5, 9, 0)],
    "decode_topk": [decode(0, 5, 9, 2), decode(0, 5, 9, 0, False)],
    "encode_project": [dense("relu", 0, 5, 9), dense("gated", 0, 5, 9)],
    "gate": [gated(0, 5), gated(3, 0, 5)],
    "relevancy": [attention(*sizes, 2, 5, 4) for sizes in ((0, 2), (2, 0))] + [attention(2, 3, 2, 0, 4)],
    "gated_relevancy": [
        *(block(C or 2, B, 2, N, 4, min(N, 3), 5, 9, 2) for C, B, N in ((2, 0, 4), (2, 3, 0))),
        (torch.zeros(0, 2, 4).double(), *block(2, 2, 2, 4, 4, 3, 5, 9, 2)[1:10], *torch.zeros(2, 0).double()),
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "number"), [(op, n) for op, given in EMPTY.items() for n in range(len(given))])
def test_empty_inputs_give_empty_results(op, number, backend):
    arguments = cast(op, EMPTY[op][number], torch.float32, device_of(backend))
    expected = outputs(getattr(ops, op)(*arguments, backend="reference"))
    assert any(result.numel() == 0 for result in expected)
    for ours, theirs in zip(outputs(getattr(ops, op)(*arguments, backend=backend)), expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("index", [-1, 9, -(2**40), 2**40])
@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair[0] in ("project", "gated_relevancy")])
def test_an_index_that_the_decoder_does_not_have(op, backend, index):
    """The error names the index. A Triton kernel can't raise: its term is NaN, and the other terms are unchanged."""
    given = {"project": sparse(3, 5, 9, 2), "gated_relevancy": block(2, 1, 2, 4, 4, 3, 5, 9, 2)}[op]
    arguments, where = list(cast(op, given, torch.float32, device_of(backend))), 3 if op == "project" else 9
    expected = outputs(getattr(ops, op)(*arguments, backend=backend))
    arguments[where] = arguments[where].clone()
    arguments[where].view(-1)[-1] = index
    if backend != "triton":
        with pytest.raises(IndexError, match=f"^indices: expected features from 0 to 8, got {index}"):
            getattr(ops, op)(*arguments, backend=backend)
        return
    found = outputs(getattr(ops, op)(*arguments, backend=backend))
    scores, exact = (result[0 if op == "project" else 1].flatten() for result in (found, expected))
    assert scores.isnan().tolist() == [False, False, True]
    assert torch.equal(scores[:2], exact[:2])


@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair[0].startswith("encode")])
def test_a_bias_may_be_wider_than_the_sae(op, backend):
    """A bfloat16 SAE with float32 biases: then the centred input is float32."""
    arguments = list(cast(op, TYPICAL[op](), torch.bfloat16, device_of(backend)))
    arguments[3] = arguments[3].float()
    if op == "encode_topk":
        arguments[2] = arguments[2].float()
    else:
        arguments[0] = arguments[0].float()
    found = outputs(getattr(ops, op)(*arguments, backend=backend))
    exact = outputs(getattr(reference, op)(*cast(op, arguments, torch.float64, device_of(backend))))
    assert found[0].dtype == arguments[0].dtype
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.05, atol=0.05 * float(exact[0].abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tanh_keeps_its_relative_precision(backend):
    """The code of a single feature whose pre-activation is x itself."""
    x = torch.logspace(-8, 1.3, 200, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    none, relu = torch.zeros(1, dtype=torch.float64), Activation("tanh_relu")
    arguments = (x, torch.ones_like(x), one, none, one, relu)
    arguments = cast("encode_project", arguments, torch.float32, device_of(backend))
    found = ops.encode_project(*arguments, backend=backend)
    torch.testing.assert_close(found.double().cpu(), arguments[0][:, 0].double().cpu().tanh(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c_max", [1e30, 1e-30])
def test_gates_keep_the_relative_precision_of_tanh(c_max, backend):
    """Checks log(w) / log(c_max) for z around 1 and every kappa; c_max is as extreme as float32 allows."""
    kappa = torch.logspace(-6, 1.3, 30, dtype=torch.float64).float()[:, None].to(device_of(backend))
    scores = torch.tensor([-1.0, 0.0, 1.0]).to(kappa)
    found = ops.gate(scores, kappa, torch.full_like(kappa, c_max), backend=backend).double().log()
    exact = reference.gate(scores.double(), kappa.double(), torch.full_like(kappa, c_max).double()).log()
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=1.2e-7)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_decoder_may_be_narrower_than_the_gradient(backend):
    """A bfloat16 decoder halves the bytes that are read; the sums keep the gradient's dtype."""
    random = torch.Generator().manual_seed(0)
    g, W_dec = torch.randn(7, 16, generator=random), torch.randn(40, 16, generator=random).bfloat16()
    values, indices = torch.rand(7, 5, generator=random), torch.randint(40, (7, 5), generator=random)
    exact = reference.project(g.double(), W_dec.double(), values.double(), indices)
    for found, expected in zip(ops.project(g, W_dec, values, indices, backend=backend), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    x, W_enc, b_enc = torch.randn(7, 16, generator=random), torch.randn(16, 40, generator=random), torch.zeros(40)
    relu = reference.Activation("relu")
    scores = ops.encode_project(x, g, W_enc, b_enc, W_dec, relu, backend=backend)
    wide = (t.double() for t in (x, g, W_enc, b_enc, W_dec))
    torch.testing.assert_close(scores, reference.encode_project(*wide, relu).float(), rtol=1e-4, atol=1e-3)
