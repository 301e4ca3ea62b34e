"""BatchTopK and Matryoshka training: steps equal those of a dense trainer with autograd and torch's Adam."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fastfg
from fastfg.sae.codes import batch_topk, pack, pairs_of
from fastfg.sae.recipe import KINDS, Recipe
from fastfg.sae.report import report
from fastfg.sae.topk_step import AUX_COEFFICIENT, BETAS, EPS, TopKStep
from fastfg.sae.trainer import SAETrainer
from tests.sae.test_train import sparse_data
from tests.sae.test_trainer import RECIPE, batch, trained

WIDTHS = {"whole": [96], "three": [7, 30, 96], "one alone": [1, 96]}
ACTIVATIONS = ("topk", "batch_topk")


class Dense:
    """The losses of the papers, on codes [T, F]."""

    def __init__(self, like: TopKStep) -> None:
        self.like, self.unused = like, like.unused.clone()
        weights = (like.W_enc.contiguous(), like.b_enc, like.W_dec, like.b_dec)
        self.weights = [w.clone().requires_grad_() for w in weights]
        self.adam = torch.optim.Adam(self.weights, betas=BETAS, eps=EPS)

    def codes(self, pre):
        if self.like.activation == "topk":
            return kept(pre, self.like.k).relu()
        return kept(pre.relu().flatten()[None], self.like.k * len(pre)).view_as(pre)

    def step(self, x, lr):
        W_enc, b_enc, W_dec, b_dec = self.weights
        pre = (x - b_dec) @ W_enc + b_enc
        f = self.codes(pre)
        x_hats = [f[:, :width] @ W_dec[:width] + b_dec for width in self.like.widths]
        losses = torch.stack([(x_hat - x).square().sum(-1).mean() for x_hat in x_hats])
        total = losses.sum()
        dead = (self.unused >= self.like.dead_after).nonzero().flatten()
        if self.like.k_aux and len(dead):
            codes = kept(pre[:, dead], min(self.like.k_aux, len(dead))).relu()
            e = (x - x_hats[-1]).detach()
            total = total + AUX_COEFFICIENT * (codes @ W_dec[dead] - e).square().sum(-1).mean()
        self.adam.zero_grad()
        total.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            self.gradients = [w.grad.clone() for w in self.weights]
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            self.unused.add_(len(x)).masked_fill_((f > 0).any(0), 0)
        return losses.detach()


def kept(pre, k):
    """The k largest of each row; a stable sort takes the first of equals."""
    order = pre.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.where(torch.zeros_like(pre, dtype=torch.bool).scatter(-1, order, True), pre, 0.0)


def made(activation, widths, k_aux=0, dtype=torch.float64):
    W_dec = F.normalize(torch.randn(96, 24, generator=torch.Generator().manual_seed(0)), dim=1).to(dtype)
    ours = TopKStep(W_dec, 5, k_aux, 200, activation=activation, widths=WIDTHS[widths])
    ours.b_enc[:30] = -2.0  # features that die
    return ours


def batches(n, T=64):
    x, _ = sparse_data(T=n * T)
    x = ((x - x.mean(0)) / 10).double()
    x[3] = 0
    x[5] *= 40  # has many of the batch's largest
    return x.split(T)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k_aux", [0, 4])
def test_steps_equal_the_dense_ones(activation, widths, k_aux):
    ours = made(activation, widths, k_aux)
    ours.unused[:30] = 200
    dense = Dense(ours)
    for i, x in enumerate(batches(12)):
        losses, counts = ours.step(x, 1e-2)
        torch.testing.assert_close(losses, dense.step(x, 1e-2), rtol=1e-10 if i == 0 else 1e-6, atol=0)
        if i == 0:  # the first moment of Adam is a tenth of the first gradient
            for m, gradient in zip(ours.m, dense.gradients, strict=True):
                torch.testing.assert_close(m * 10, gradient, rtol=1e-10, atol=1e-12)
        for a, b in zip((*ours.weights, ours.b_dec), dense.weights, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(ours.unused, dense.unused)
        assert int(counts.sum()) <= 5 * len(x)


def test_one_prefix_is_no_matryoshka_and_changes_no_bit():
    (x,) = batches(1)
    one, other = made("topk", "whole", 4), TopKStep(made("topk", "whole").W_dec, 5, 4, 200)
    other.b_enc[:30] = -2.0
    assert torch.equal(one.step(x, 1e-2)[0], other.step(x, 1e-2)[0])
    assert torch.equal(one.W_enc, other.W_enc)


@pytest.mark.parametrize("k", [1, 2, 5, 24])
def test_the_largest_of_a_batch_by_hand(k):
    """Ties in a token and across tokens, a token that has most of them, and tokens without a positive one."""
    random = torch.Generator().manual_seed(k)
    pre = torch.randint(-6, 5, (12, 24), generator=random).double()
    pre[3] = 9
    pre[4:7] = -1
    seen = []

    def encode(x, m):
        seen.append((len(x), m))
        order = x.sort(dim=1, descending=True, stable=True).indices[:, :m]
        return x.gather(1, order).relu(), order

    found = batch_topk(encode, pre, k, 24)
    flat = pre.relu().flatten()
    expected = flat.sort(descending=True, stable=True).indices[: 12 * k]
    expected = expected[flat[expected] > 0].sort().values
    assert torch.equal((found.tokens * 24 + found.indices).sort().values, expected)
    assert torch.equal(found.values, pre[found.tokens, found.indices])
    assert torch.equal(found.tokens, found.tokens.sort().values)
    assert seen[0] == (12, min(2 * k, 24))
    assert all(tokens < 12 for tokens, _ in seen[1:])


def test_rows_hold_each_feature_once():
    values = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    values[2] = 0
    values[1, 4:] = 0
    indices = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(t))[:9] for t in range(6)])
    codes = pack(pairs_of(values, indices), 6, [10, 11, 40], 4)
    assert codes.parts[0].tokens is None
    assert codes.parts[0].rows == slice(0, 6)
    found = torch.zeros(6, 40)
    for part in codes.parts:
        low, high = [0, 10, 11, 40][part.group : part.group + 2]
        rows, tokens = codes.values[part.rows], range(6) if part.tokens is None else part.tokens.tolist()
        for token, row, of in zip(tokens, rows, codes.indices[part.rows], strict=True):
            assert all(low <= int(index) < high for index in of[row > 0])
            found[token].index_add_(0, of, row)
    assert torch.equal(found, torch.zeros(6, 40).scatter_(1, indices, values))


def test_the_threshold_is_the_mean_of_the_smallest_kept():
    ours = made("batch_topk", "whole")
    for x in batches(3):
        ours.step(x, 1e-2)
    x = torch.cat(batches(3))[:150]
    dense = Dense(ours)
    pre = [(part - ours.b_dec) @ ours.W_enc + ours.b_enc for part in (x[:64], x[64:128])]
    expected = torch.stack([dense.codes(one)[dense.codes(one) > 0].min() for one in pre]).mean()
    torch.testing.assert_close(ours.threshold(x, 64), expected.detach(), rtol=1e-10, atol=0)


def test_steps_repeat_to_the_same_bits():
    results = []
    for _ in range(2):
        ours = made("batch_topk", "three", 4, torch.float32)
        for x in batches(3):
            ours.step(x.float(), 1e-2)
        results.append([*ours.weights, ours.b_dec, *ours.m, *ours.v])
    assert all(map(torch.equal, *results))


# The trainer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 6, generator=random).relu() @ torch.randn(6, 16, generator=random)
    return 5 * x + torch.randn(16, generator=random)


OPTIONS = dataclasses.replace(RECIPE, activation="batch_topk", prefixes=(0.125, 0.5, 1))


@pytest.mark.parametrize("kind", ["trained", "frozen-decoder"])
def test_a_resumed_training_has_the_same_bits(data, tmp_path, kind):
    recipe = dataclasses.replace(OPTIONS, kind=kind)
    expected = trained(data, recipe)
    trained(data, recipe, 7).save(tmp_path / "checkpoint")
    again = SAETrainer(recipe, data)
    again.resume(tmp_path / "checkpoint")
    while again.done < recipe.steps:
        again.train(batch(data, again.done))
    for name, tensor in expected._tensors().items():
        assert torch.equal(tensor, again._tensors()[name]), name
    with pytest.raises(ValueError, match="^out: expected a checkpoint with recipe"):
        SAETrainer(dataclasses.replace(recipe, prefixes=(1,)), data).resume(tmp_path / "checkpoint")


def test_each_control_keeps_its_part_and_has_about_k_features_per_token(data):
    recipe = dataclasses.replace(OPTIONS, steps=60, lr=2e-2)
    start = SAETrainer(recipe, data)
    found = {kind: trained(data, dataclasses.replace(recipe, kind=kind)) for kind in KINDS}
    assert torch.equal(found["frozen-decoder"].W_dec, start.W_dec)
    assert torch.equal(found["frozen-encoder"].W_enc, start.W_enc)
    quality = {kind: report(trainer.finish(), data) for kind, trainer in found.items()}
    for kind, one in quality.items():
        assert one.l0 == pytest.approx(recipe.k, rel=0.1), kind
    assert quality["trained"].explained_variance == max(one.explained_variance for one in quality.values())


def test_the_saved_sae_has_a_threshold(data, tmp_path):
    trainer = trained(data, dataclasses.replace(OPTIONS, steps=40))
    trainer.finish(site="resid_post").save(tmp_path)
    sae = fastfg.load_saes(tmp_path, layers=3)[3]
    assert (sae.activation_name, sae.k) == ("batch_topk", None)
    threshold = trainer.threshold(trainer.scaled(data), 128)
    torch.testing.assert_close(sae.threshold, trainer.unit * threshold)
    part = data[:512]
    centred = trainer.scaled(part) - trainer.b_dec
    pre = centred @ trainer.W_enc + trainer.b_enc
    expected = torch.where(pre > threshold, pre, 0.0)
    torch.testing.assert_close(sae.encode(part), expected * trainer.unit, rtol=1e-4, atol=1e-4)
    found = report(sae, data)
    assert found.l0 != round(found.l0)
    assert found.l0 == pytest.approx(RECIPE.k, rel=0.1)


def test_prefixes_put_more_into_the_first_features(data):
    def first_alone(recipe):
        sae = trained(data, dataclasses.replace(recipe, steps=100, lr=2e-2)).finish()
        f = sae.encode(data)
        f[:, 16:] = 0
        return float((sae.decode(f) - data).square().sum())

    nested = dataclasses.replace(RECIPE, prefixes=(0.25, 1))
    assert first_alone(nested) < 0.7 * first_alone(RECIPE)


def test_the_recipe_of_before_is_written_as_before():
    assert "prefixes" not in RECIPE.as_dict()
    assert "activation" not in RECIPE.as_dict()
    assert OPTIONS.as_dict()["prefixes"] == (0.125, 0.5, 1)
    assert OPTIONS.widths == [8, 32, 64]


@pytest.mark.parametrize("prefixes", [(), (0.5,), (0.5, 0.5, 1), (0, 1), (0.5, 1, 1.5), (1, 0.5), (0.001, 1), (True,)])
def test_wrong_prefixes_are_named(prefixes):
    with pytest.raises(ValueError, match="^prefixes: expected increasing shares of the 64 features that end with 1"):
        Recipe(64, 2, 3, prefixes=prefixes)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="^activation: expected one of .*, got 'relu'"):
        Recipe(64, 2, 3, activation="relu")


def test_no_threshold_without_an_active_feature():
    with pytest.raises(ValueError, match="^x: expected tokens with an active feature"):
        made("batch_topk", "whole").threshold(torch.zeros(64, 24), 64)
