"""The parts of a patch's score add up to it, and what is said of features is what a slow count finds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fastfg
from fastfg.study import evidence
from fastfg.study.add_evidence import add_evidence, both_ends
from fastfg.study.evidence import ablate, patch_evidence, strongest_features
from fastfg.study.feature_evidence import Histogram, LabelledBatch, feature_evidence
from tests.report import toy
from tests.tools import random_sae

KINDS = {
    "topk": ("topk", {"k": 9}),
    "relu": ("relu", {}),
    "layer norm": ("topk", {"k": 9, "normalize": "layer_norm"}),
}
GATE = fastfg.Gate((1, 2), kappa=0.7, c_max=5.0)


def saes_of(kind):
    activation, options = KINDS[kind]
    return {block: random_sae(32, 100, activation, **options) for block in GATE.layers}


def gradients(model, images, block, target):
    """x and g at the patches of a block, by autograd alone."""
    kept = []
    handle = model.blocks[block].register_forward_hook(lambda m, i, o: kept.append(o) or o.retain_grad())
    with torch.enable_grad():
        model(images.clone().requires_grad_()).gather(1, target[:, None]).sum().backward()
    handle.remove()
    model.zero_grad()
    return kept[0].detach()[:, 1:], kept[0].grad[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescale", [False, True])
def test_the_parts_add_up_to_the_score(model, images, kind, rescale):
    saes, gate = saes_of(kind), fastfg.Gate((1, 2), kappa=0.7, c_max=5.0, rescale=rescale)
    target = torch.tensor([0, 1, 2])
    found = patch_evidence(model, images, gate, saes, target=target, n=3)
    run = fastfg.attribute(model, images, saes=saes, gate=gate, target=target)
    for block in gate.layers:
        x, g = gradients(model, images, block, target)
        sae = saes[block]
        scale = sae.normalize(x).scale if rescale else torch.ones(*x.shape[:2], 1, dtype=x.dtype)
        terms = sae.encode(x) * (g @ sae.W_dec.T) * scale  # [B, P, F]
        for i in range(3):
            one, each = found[i].blocks[block].evidence, terms[i].numpy()
            order = np.argsort(-np.abs(each), axis=1)[:, :3]
            np.testing.assert_allclose(one.contributions, np.take_along_axis(each, order, 1), rtol=0, atol=1e-12)
            others = each.copy()
            np.put_along_axis(others, one.features, 0, 1)
            np.testing.assert_allclose(one.remaining, others.sum(1), rtol=0, atol=1e-11)
            np.testing.assert_allclose(one.contributions.sum(1) + one.remaining, one.scores, rtol=0, atol=1e-14)
            np.testing.assert_allclose(one.scores, run.scores[block][i], rtol=0, atol=1e-12)
            np.testing.assert_allclose(one.gates, run.gates[block][i], rtol=0, atol=1e-12)
            np.testing.assert_allclose(one.gates, 5.0 ** np.tanh(0.7 * one.z), rtol=1e-9)
            np.testing.assert_allclose(one.g_dot_x, (x[i] * g[i]).sum(-1), rtol=0, atol=1e-12)
            left_out = (g[i] * (x[i] - sae(x[i]))).sum(-1)
            np.testing.assert_allclose(one.sae_error, left_out, rtol=0, atol=1e-11)
            np.testing.assert_allclose(one.scores + one.bias + one.sae_error, one.g_dot_x, rtol=0, atol=1e-12)
            assert (one.active == (each != 0).sum(1)).all()
            if kind != "layer norm":
                np.testing.assert_allclose(one.bias, g[i] @ sae.b_dec, rtol=0, atol=1e-10)


def test_more_contributions_than_there_are_features(model, images):
    (found, *_) = patch_evidence(model, images, GATE, saes_of("topk"), n=20)
    one = found.blocks[1].evidence
    assert one.features.shape[1] == 9
    np.testing.assert_allclose(one.remaining, 0, atol=1e-12)


@pytest.mark.parametrize(
    "other", [{"score": "activation"}, {"shuffle_seed": 1}, {"permute_seed": 1}, {"blurred": True}]
)
def test_other_gates_are_refused(model, images, other):
    with pytest.raises(ValueError, match="gate: expected one with combined scores"):
        patch_evidence(model, images, fastfg.Gate((1,), **other), saes_of("topk"))


def test_a_feature_that_is_taken_out(model, images):
    """The row is what a run by hand gives: x without the feature's part from the block on."""
    saes = saes_of("relu")
    found = patch_evidence(model, images, GATE, saes)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    table = ablate(model, images, ["a", "b", "c"], found, GATE, saes, per_block=2)
    assert len(table) == 3 * 2 * 2
    for row in table.to_dict("records"):
        i, block, sae = "abc".index(row["image"]), row["block"], saes[row["block"]]
        x = fastfg.residuals(model, images[i : i + 1], block)[block]
        part = sae.encode(x)[..., row["feature"], None] * sae.W_dec[row["feature"]]

        def without(module, given, out, part=part):
            return torch.cat([out[:, :1], out[:, 1:] - part], 1)

        handle = model.blocks[block].register_forward_hook(without)
        run = fastfg.attribute(model, images[i : i + 1], saes=saes, gate=GATE, target=found[i].target)
        handle.remove()
        logit = float(run.logits[0, found[i].target])
        assert row["actual_logit"] == pytest.approx(logit - found[i].logit, abs=1e-12)
        gate = float(run.gates[block][0, row["patch"]])
        assert row["actual_gate"] == pytest.approx(gate - row["gate"], abs=1e-12)
        _, g_all = gradients(model, images[i : i + 1], block, torch.tensor([found[i].target]))
        assert row["predicted_logit"] == pytest.approx(-float((part * g_all).sum()), abs=1e-11)
    assert all(bool((t == before[name]).all()) for name, t in model.state_dict().items())
    assert not any(block._forward_hooks for block in model.blocks)


def test_taking_features_out_encodes_each_block_once(model, images, monkeypatch):
    """One pass over an image gives its tokens, and one encoding per block all features of it that are taken out."""
    saes = saes_of("relu")
    found = patch_evidence(model, images[:2], GATE, saes)
    passes, encoded, plain = [], [], {name: getattr(evidence, name) for name in ("residuals", "attribute")}
    monkeypatch.setattr(evidence, "residuals", lambda *given: passes.append(given[2]) or plain["residuals"](*given))
    encode = fastfg.SparseAutoencoder.encode
    monkeypatch.setattr(
        fastfg.SparseAutoencoder, "encode", lambda sae, x: encoded.append(tuple(x.shape)) or encode(sae, x)
    )
    gates = []
    monkeypatch.setattr(
        evidence,
        "attribute",
        lambda *given, **more: gates.append(more["gate"].layers) or plain["attribute"](*given, **more),
    )
    ablate(model, images[:2], ["a", "b"], found, GATE, saes, per_block=3)
    assert passes == [[1, 2], [1, 2]]
    assert encoded == [(24, 32)] * 4
    assert gates == [(1,), (2,)] * 2


def test_the_predicted_gate_leaves_the_feature_out_of_the_scores(model, images):
    saes = saes_of("topk")
    found = patch_evidence(model, images[:1], GATE, saes)
    for row in ablate(model, images[:1], ["a"], found, GATE, saes, per_block=1).to_dict("records"):
        terms = found[0].blocks[row["block"]]
        own = np.where(terms.features == row["feature"], terms.values, 0).sum(1)
        assert row["patch"] == np.abs(own).argmax()
        scores = torch.from_numpy(terms.evidence.scores - own)
        gate = fastfg.ops.gate(scores, GATE.kappa, GATE.c_max)[row["patch"]]
        assert row["predicted_gate"] == pytest.approx(float(gate) - row["gate"], abs=1e-12)


def test_what_features_respond_to(model):
    """By hand: density, mass by class, the strongest patches, one per image."""
    images = torch.randn(6, 3, 32, 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sae, labels = saes_of("topk")[1], ["a", "b", "a", None, "b", "a"]
    chosen = [3, 17, 40]
    batches = [
        LabelledBatch(images[s], [str(k) for k in range(s.start, s.stop)], labels[s])
        for s in (slice(0, 4), slice(4, 6))
    ]
    found = feature_evidence(model, batches, {1: sae}, {1: chosen, 2: []}, crops=2)
    codes = sae.encode(fastfg.residuals(model, images, 1)[1])[..., chosen]
    assert list(found) == [(1, 3), (1, 17), (1, 40)]
    for k, feature in enumerate(chosen):
        one, own = found[1, feature], codes[..., k]
        assert one.density == pytest.approx(float((own > 0).double().mean()))
        assert (one.n_patches, one.n_images) == (6 * 24, 6)
        assert one.counts.sum() == int((own > 0).sum())
        known = [i for i, label in enumerate(labels) if label]
        total = float(own[known].sum())
        for label in "ab" if total else "":
            share = float(own[[i for i in known if labels[i] == label]].sum()) / total
            assert one.lift[label] == pytest.approx(share / (labels.count(label) / 5))
        best = own.amax(1)
        order = [i for i in best.argsort(descending=True, stable=True).tolist() if best[i] > 0][:2]
        assert [crop.key for crop in one.crops] == [str(i) for i in order]
        for crop, i in zip(one.crops, order, strict=True):
            assert crop.activation == pytest.approx(float(best[i]))
            left, top, width, height = crop.box
            assert (width, height) == (8, 8)
            assert crop.picture[top : top + 8, left : left + 8].shape == (8, 8, 3)


def test_the_histogram_counts_each_number_once():
    values = np.random.default_rng(0).gamma(1, 3, 500)
    histogram = Histogram(8)
    for part in np.array_split(np.concatenate([values, [64.0]]), 40):
        histogram.add(part)
    counts, _ = np.histogram(np.append(values, 64.0), bins=histogram.edges)
    assert histogram.counts.tolist() == counts.tolist()


def test_the_strongest_features(model, images):
    found = patch_evidence(model, images, GATE, saes_of("topk"), n=2)
    totals = {}
    for image in found:
        for block, terms in image.blocks.items():
            for features, values in zip(terms.evidence.features, terms.evidence.contributions, strict=True):
                for feature, value in zip(features, values, strict=True):
                    totals[block, int(feature)] = totals.get((block, int(feature)), 0) + abs(value)
    best = sorted(sorted(totals, key=totals.get, reverse=True)[:5])
    assert [(block, f) for block, fs in strongest_features(found, 5).items() for f in fs] == best


def test_a_report_gets_its_evidence(model, images):
    contents = toy.full(3, grid=4, explained=0)
    keys = [image.key for image in contents.images]
    rectangular = [replace(image, maps={name: np.zeros((4, 6)) for name in image.maps}) for image in contents.images]
    contents = replace(contents, images=rectangular, features={}, ablations=None)
    batches = [LabelledBatch(images, keys, ["a", "b", None])]
    chosen = dict(zip(keys[:2], images[:2], strict=True))
    made = add_evidence(
        contents, model, chosen, GATE, saes_of("topk"), batches, of="gated", most_features=5, per_block=1
    )
    assert [list(image.evidence) for image in made.images] == [[1, 2], [1, 2], []]
    assert len(made.features) == 5
    assert len(made.ablations) == 2 * 2
    assert made.evidence_of == "gated"
    with pytest.raises(ValueError, match="images: expected keys of images of the report, got .'other'."):
        add_evidence(contents, model, {"other": images[0]}, GATE, saes_of("topk"))


def test_images_at_both_ends():
    contents = toy.full(7, grid=2, explained=0)
    wide = contents.scores.pivot(index="image", columns="variant", values="srg")
    order = (wide["gated"] - wide["vanilla"]).sort_values(ascending=False).index
    assert both_ends(contents, 3) == [*order[:2], order[-1]]
    assert both_ends(contents, 7) == [image.key for image in contents.images]
