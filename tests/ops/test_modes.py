"""Every op on every backend: in inference mode, with inputs that require grad, and on empty inputs."""

import pytest
import torch

from fastfg import ops
from tests.ops.cases import LIVE, TYPICAL, backends, cast, each, outputs
from tests.ops.cases import encode_project as dense
from tests.ops.cases import encode_topk as topk
from tests.ops.cases import gate as gated
from tests.ops.cases import gated_relevancy as block
from tests.ops.cases import project as sparse
from tests.ops.cases import relevancy as attention


@pytest.fixture
def several_threads():
    """Enough threads for parallel loops to leave the calling thread, where a mode is not known."""
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
@pytest.mark.parametrize(("op", "backend"), LIVE)
def test_results_are_the_same_in_every_mode(op, backend, mode):
    """Also with tensors that require grad; the results never do."""
    run, plain = getattr(ops, op), cast(op, TYPICAL[op](), torch.float32)
    with torch.no_grad():
        expected = run(*plain, backend=backend)
    with MODES[mode]():
        same(run(*each(plain, lambda _, tensor: tensor.clone()), backend=backend), expected)
        same(run(*each(plain, asks_for_a_gradient), backend=backend), expected)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize(("op", "backend"), LIVE)
def test_results_of_inference_tensors_serve_outside(op, backend):
    with torch.inference_mode():
        arguments = each(cast(op, TYPICAL[op](), torch.float32), lambda _, tensor: tensor.clone())
    for result in outputs(getattr(ops, op)(*arguments, backend=backend)):
        assert not result.is_inference()


EMPTY = {
    "encode_topk": [topk(0, 5, 9, 2)],
    "project": [sparse(0, 5, 9, 2), sparse(3, 5, 9, 0)],
    "encode_project": [dense("relu", 0, 5, 9), dense("gated", 0, 5, 9)],
    "gate": [gated(0, 5), gated(3, 0, 5)],
    "relevancy": [attention(*sizes, 2, 5, 4) for sizes in ((0, 2), (2, 0))] + [attention(2, 3, 2, 0, 4)],
    "gated_relevancy": [
        *(block(C or 2, B, 2, N, 4, min(N, 3), 5, 9, 2) for C, B, N in ((2, 0, 4), (2, 3, 0))),
        (torch.zeros(0, 2, 4).double(), *block(2, 2, 2, 4, 4, 3, 5, 9, 2)[1:10], *torch.zeros(2, 0).double()),
    ],
}


@pytest.mark.parametrize(("op", "number"), [(op, n) for op, given in EMPTY.items() for n in range(len(given))])
def test_empty_inputs_give_empty_results(op, number):
    arguments = cast(op, EMPTY[op][number], torch.float32)
    expected = outputs(getattr(ops, op)(*arguments, backend="reference"))
    assert any(result.numel() == 0 for result in expected)
    for backend in backends(op, arguments[0]):
        for ours, theirs in zip(outputs(getattr(ops, op)(*arguments, backend=backend)), expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), backend
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("index", [-1, 9])
@pytest.mark.parametrize("op", ["project", "gated_relevancy"])
def test_a_feature_that_the_decoder_lacks_is_named_on_the_cpu(op, index):
    """A Triton kernel can't raise: there, the term is NaN (tests/kernels)."""
    arguments = list({"project": sparse(3, 5, 9, 2), "gated_relevancy": block(2, 1, 2, 4, 4, 3, 5, 9, 2)}[op])
    where = 3 if op == "project" else 9
    arguments[where] = arguments[where].clone()
    arguments[where].view(-1)[-1] = index
    for backend in ("reference", *(b for o, b in LIVE if (o, b) == (op, "cpp"))):
        with pytest.raises(IndexError, match=f"^indices: expected features from 0 to 8, got {index}"):
            getattr(ops, op)(*arguments, backend=backend)


@pytest.mark.parametrize(("op", "backend"), [(o, b) for o, b in LIVE if o.startswith("encode")])
def test_a_bias_may_be_wider_than_the_sae(op, backend):
    """A bfloat16 SAE with float32 biases; what the caller centred is float32 then."""
    arguments = list(cast(op, TYPICAL[op](), torch.bfloat16))
    arguments[3] = arguments[3].float()
    if op == "encode_topk":
        arguments[2] = arguments[2].float()
    else:
        arguments[0] = arguments[0].float()
    found = outputs(getattr(ops, op)(*arguments, backend=backend))
    exact = outputs(getattr(ops, op)(*cast(op, arguments, torch.float64), backend="reference"))
    assert found[0].dtype == arguments[0].dtype
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.05, atol=0.05 * float(exact[0].abs().max()))


@pytest.mark.parametrize("backend", [b for op, b in LIVE if op == "encode_project"])
def test_tanh_keeps_its_relative_precision(backend):
    """The code of one feature, whose pre-activation is x itself."""
    from fastfg.reference import Activation

    x = torch.logspace(-8, 1.3, 200, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    none, relu = torch.zeros(1, dtype=torch.float64), Activation("tanh_relu")
    arguments = cast("encode_project", (x, torch.ones_like(x), one, none, one, relu), torch.float32)
    found = ops.encode_project(*arguments, backend=backend)
    torch.testing.assert_close(found.double().cpu(), arguments[0][:, 0].double().cpu().tanh(), rtol=1e-6, atol=0)
