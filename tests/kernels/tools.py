"""What the parity tests share: the interpreter, inputs, and the comparison with the float64 reference.

Import this before anything of ``fastfg.kernels``: the interpreter must be chosen before triton is first imported.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastfg import reference
from fastfg.ops.gate import as_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpret():
    """Sets Triton to its interpreter, which needs that said before it is first imported, and mends it in two places."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        """NumPy 2.4 gives no int of an array of one entry, which Triton 3.6 asks for at each loop bound."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(x):
        """bfloat16 is kept as its bits, and Triton 3.6 multiplies those."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = dot


if DEVICE == "cpu":
    interpret()

EPS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Memory that is not yet written holds NaN, or a number too large for any index."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
        yield


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def block(C, N, dh, B=2, H=2, dtype=torch.float32):
    """rows, q, k, v, dO, scale, gates; q, k, v are strided views of one packed tensor, as models have them."""
    q, k, v = draw(B, N, 3, H, dh, dtype=dtype).permute(2, 0, 3, 1, 4)
    rows, gates = draw(C, B, N, dtype=dtype, seed=1), draw(C, B, N, dtype=dtype, seed=2).exp()
    return rows, q, k, v, draw(B, N, H, dh, dtype=dtype, seed=3).transpose(1, 2), dh**-0.5, gates


def codes(T, F, K, dtype=torch.float32):
    """values, indices."""
    indices = torch.rand(T, F, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :K]
    return draw(T, K, dtype=dtype, seed=4).abs(), indices.to(DEVICE)


def encoder(T, d, F, dtype=torch.float32):
    """x, W_enc, b_enc, b_dec."""
    W_enc, b_enc = draw(d, F, seed=1) / d**0.5, 0.1 * draw(F, seed=2)
    return draw(T, d, dtype=dtype), W_enc.to(dtype), b_enc.to(dtype), 0.1 * draw(d, dtype=dtype, seed=3)


def activation(name, F):
    threshold = torch.tensor(0.5, device=DEVICE) if name == "batch_topk" else draw(F, seed=6).abs()
    return reference.Activation(name, None, threshold, *(draw(F, seed=seed) for seed in (7, 8, 9)))


def widen(value):
    """The same argument in float64."""
    if isinstance(value, reference.Activation):
        return reference.Activation(*(widen(field) for field in vars(value).values()))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def error(got, exact):
    """The largest one, relative to the result's scale; NaN only where the reference has it."""
    got, exact = got.double(), exact.double()
    assert got.shape == exact.shape
    assert torch.equal(got.isnan(), exact.isnan())
    known = ~exact.isnan()
    if not known.any():
        return 0.0
    return ((got - exact)[known].abs().max() / exact[known].abs().max().clamp(min=1e-30)).item()


def every(result):
    return result if isinstance(result, tuple) else (result,)


def launch(kernel, *arguments, **options):
    """``kernel``, which has its torch op's signature, on the arguments of its reference."""
    op = kernel.__name__
    if op == "gate":
        rows, *numbers = as_rows(*arguments)
        gates = kernel(rows.reshape(-1, rows.shape[-1]), *(n.reshape(-1) for n in numbers))
        return gates.reshape(rows.shape).to(arguments[0].dtype)
    if op == "encode_project":
        *tensors, a = arguments
        return kernel(*tensors, a.name, a.threshold, a.r_mag, a.b_gate, a.b_mag)
    if op in ("relevancy", "gated_relevancy"):
        *tensors, identity = arguments if isinstance(arguments[-1], str) else (*arguments, "transmm")
        tensors = (*tensors, None)[:7] if op == "relevancy" else tensors  # gates may be left out
        return kernel(*tensors, identity == "paper", **options)
    return kernel(*arguments)


def check(kernel, judge, *arguments, allowed=0.0):
    """float32: to 1e-5; narrower: at most twice the same-dtype reference's error. No argument changes."""
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    got, exact, same = every(launch(kernel, *arguments)), every(judge(*map(widen, arguments))), every(judge(*arguments))
    for a, b in zip(arguments, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num())
    dtype = arguments[0].dtype
    for ours, theirs, rounded in zip(got, exact, same, strict=True):
        assert ours.dtype == dtype
        limit = max(allowed, EPS[dtype])
        if dtype != torch.float32:
            limit = max(limit, 2 * error(rounded, theirs))
        assert error(ours, theirs) <= limit
    return got if len(got) > 1 else got[0]


def check_topk(kernel, x, W_enc, b_enc, b_dec, k):
    """The chosen features' exact pre-activations are the K largest, to rounding; none is chosen twice."""
    values, indices = kernel(x, W_enc, b_enc, b_dec, k)
    exact, _ = reference.encode_topk(*map(widen, (x, W_enc, b_enc, b_dec)), k)
    pre = reference.preactivations(*map(widen, (x, W_enc, b_enc, b_dec)))
    assert indices.dtype == torch.int64
    assert all(len(row.unique()) == k for row in indices)
    assert bool((values.diff(dim=-1) <= 0).all())
    allowed = 1e-5 if x.dtype == torch.float32 else 2 * EPS[x.dtype]
    assert error(values, exact) <= allowed
    assert error(pre.gather(1, indices).relu(), exact) <= allowed
