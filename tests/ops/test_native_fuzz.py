"""The native ops on random arguments, right and wrong. `make sanitize` runs the same tests under the sanitizers."""

import pytest
import torch

from tests.ops.native_cases import BUILD, Draw, judge, run

SEEDS = range(40)
WIDE = {"gate": ("scores", "kappa", "c_max"), "relevancy": ("rows", "gates"), "gated_relevancy": ("rows",)}
EXTREMES = (-1, -(2**62), 2**31, 2**62)


def strided(tensor, draw):
    """The same numbers in another memory layout."""
    layout = draw.choice(["plain", "turned", "every other", "offset"])
    if layout == "turned" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == "every other":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "offset" and tensor.ndim:
        return torch.cat([tensor, tensor])[len(tensor) :]
    return tensor


def arguments_of(op, seed, dtype=torch.float32):
    draw = Draw(seed, dtype)
    arguments = BUILD[op](draw)
    return {n: strided(a, draw) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}, draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", BUILD)
def test_any_size_and_layout(op, dtype):
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2}[dtype]
    for seed in SEEDS:
        arguments, _ = arguments_of(op, seed, dtype)
        for name in WIDE.get(op, ()) if dtype == torch.bfloat16 else ():
            arguments[name] = arguments[name].float() if arguments[name] is not None else None
        found, expected = run(op, arguments), judge(op, arguments)
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours.shape == theirs.shape
            if ours.is_floating_point() and ours.numel() and not (op == "gated_relevancy" and dtype == torch.bfloat16):
                # a gate may magnify the error of a score, so gates are compared only where scores are exact enough
                limit = tolerance * (20 if op == "gated_relevancy" else 1)
                error = float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1))
                assert error <= limit, (seed, i)


@pytest.mark.parametrize("op", BUILD)
def test_one_wrong_argument(op):
    """An error that names the argument, or a result if the change is legal. The sanitizers check the rest."""
    refused = 0
    for seed in SEEDS:
        arguments, draw = arguments_of(op, seed)
        name = draw.choice([n for n, a in arguments.items() if isinstance(a, torch.Tensor)])
        arguments[name] = wrong(arguments[name], draw)
        message = refusal(op, arguments)
        assert message is None or message.split(": expected")[0] in arguments, message
        refused += message is not None
    assert refused > len(SEEDS) / 2


def refusal(op, arguments):
    """The message of the error that the op raises, or None."""
    try:
        run(op, arguments)
    except (ValueError, IndexError) as error:
        return str(error)
    return None


def wrong(tensor, draw):
    """The tensor with one size larger or smaller, one dimension more or less, or another dtype."""
    sizes = list(tensor.shape)
    what = draw.choice(["larger", "smaller", "longer", "shorter", "dtype"])
    if what in ("larger", "smaller") and sizes:
        i = draw.sizes.randrange(len(sizes))
        sizes[i] = max(0, sizes[i] + (1 if what == "larger" else -1))
    elif what == "shorter" and sizes:
        sizes.pop()
    elif what == "dtype":
        return tensor.to(draw.choice([torch.int16, torch.bool, torch.complex64]))
    else:
        sizes.append(1)
    return torch.ones(sizes, dtype=tensor.dtype)


@pytest.mark.parametrize("op", ["project", "decode_topk", "gated_relevancy"])
def test_an_index_out_of_range(op):
    tried = 0
    for seed in SEEDS:
        arguments, draw = arguments_of(op, seed)
        indices, F = arguments["indices"].contiguous(), len(arguments["W_dec"])
        if not indices.numel():
            continue
        bad = draw.choice([F, *EXTREMES])
        indices.view(-1)[draw.sizes.randrange(indices.numel())] = bad
        with pytest.raises(IndexError, match=rf"indices: expected features from 0 to {F - 1}, got {bad}"):
            run(op, {**arguments, "indices": indices})
        tried += 1
    assert tried > len(SEEDS) / 4


def test_topk_of_values_with_ties_infinities_and_nan():
    """Whole numbers, infinities and NaN in the bias. The same features are chosen as by a stable sort."""
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    for seed in range(200):
        draw = Draw(seed)
        T, F = draw.size(1, 5), draw.size(1, 1300)
        k = draw.size(1, F)
        among = levels[draw.integers(len(levels), draw.sizes.randint(1, 4))]
        b_enc = among[draw.integers(len(among), F)]
        values, indices = torch.ops.fastfg.encode_topk(torch.zeros(T, 3), torch.zeros(3, F), b_enc, None, k)
        expected = b_enc.expand(T, F).sort(dim=-1, descending=True, stable=True)
        assert torch.equal(indices, expected.indices[:, :k]), seed
        torch.testing.assert_close(values, expected.values[:, :k].relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("T", "F", "k"), [(1024, 40, 5), (1031, 333, 40), (1100, 1500, 1), (1025, 17, 17)])
@pytest.mark.parametrize("turned", [False, True])
def test_topk_of_many_tokens_with_ties_and_nan(T, F, k, turned):
    """Many tokens take another way on some processors. Whole numbers: sums are exact, and ties everywhere."""
    draw = Draw(T)
    x, W_enc = (draw.integers(3, *sizes).float() - 1 for sizes in ((T, 7), (7, F)))
    b_enc = torch.where(draw.integers(50, F) == 0, torch.nan, draw.integers(3, F) - 1.0)
    expected = (x @ W_enc + b_enc).sort(dim=-1, descending=True, stable=True)
    W_enc = W_enc.mT.contiguous().mT if turned else W_enc
    values, indices = torch.ops.fastfg.encode_topk(x, W_enc, b_enc, None, k)
    assert torch.equal(indices, expected.indices[:, :k])
    torch.testing.assert_close(values, expected.values[:, :k].relu(), rtol=0, atol=0, equal_nan=True)
