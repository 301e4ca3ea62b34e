"""A small report with every part, made of numbers that anyone can check."""

import numpy as np
import pandas as pd

from fastfg.report.contents import (
    Claim,
    Condition,
    Contents,
    Crop,
    Effect,
    FeatureEvidence,
    ImageEntry,
    PatchEvidence,
    Variant,
)
from fastfg.study import paired, rank_test, summarize

SHIFT = {"vanilla": 0.0, "gated": 0.1, "no SAE": 0.08, "random": -0.2} | {f"shuffled {s}": 0.05 for s in range(5)}
ROLES = {"vanilla": "baseline", "gated": "method", "no SAE": "control", "random": "control"}
METRICS = ("srg", "saco", "pixel_flipping")


def scores(n, keys=None, seed=0):
    random = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        base = random.normal(size=3)
        for variant, shift in SHIFT.items():
            values = base + (shift + 0.1 * random.normal(size=3)) * np.array([1, 1, -1])
            key = keys[i] if keys else f"image-{i:03d}"
            rows.append(
                {
                    "index": i,
                    "image": key,
                    "variant": variant,
                    "target": i % 2,
                    **dict(zip(METRICS, values, strict=True)),
                }
            )
    return pd.DataFrame(rows)


def evidence(P, n, random, F=128):
    contributions = random.normal(size=(P, n)) * np.exp(-np.arange(n) / 3)
    remaining, bias, error = random.normal(size=(3, P)) * 0.2
    s = contributions.sum(1) + remaining
    z = (s - np.median(s)) / (1.4826 * np.median(np.abs(s - np.median(s))))
    features = (random.integers(0, F, size=(P, 1)) + 7 * np.arange(n)) % F
    return PatchEvidence(
        features=features,
        contributions=contributions,
        remaining=remaining,
        active=np.full(P, 32),
        scores=s,
        z=z,
        gates=np.exp(np.log(10) * np.tanh(0.5 * z)),
        sae_error=error,
        bias=bias,
        g_dot_x=s + bias + error,
    )


def picture(side, random):
    """A photograph of sorts: soft shapes and grain."""
    y, x = np.mgrid[:side, :side] / side
    base = [np.sin(4 * x + random.normal() * 3) * np.cos(5 * y + random.normal() * 3) for _ in range(3)]
    return np.clip(128 + 80 * np.stack(base, -1) + random.normal(size=(side, side, 3)) * 12, 0, 255).astype(np.uint8)


def images(keys, side=64, grid=4, shown=6, explained=2, labels=("cell", "defect"), seed=1):
    random = np.random.default_rng(seed)
    return [
        ImageEntry(
            key,
            picture(side, random),
            {name: random.gamma(2, size=(grid, grid)) for name in ROLES},
            label=labels[i % 2],
            predicted=labels[(i + (i % 7 == 0)) % 2],
            probability=0.5 + 0.5 * random.random(),
            explained=labels[i % 2],
            evidence={b: evidence(grid * grid, shown, random) for b in (4, 8)} if i < explained else {},
        )
        for i, key in enumerate(keys)
    ]


def features(entries, random, labels=("cell", "defect")):
    """What is known of each feature that the evidence names."""
    found = {}
    crops = [Crop(picture(48, random), "image-000", 3.0 - c, (16, 16, 16, 16), labels[0]) for c in range(5)]
    for entry in entries:
        for block, one in entry.evidence.items():
            for feature in np.unique(one.features):
                counts = random.integers(0, 50, 12)
                found.setdefault(
                    (block, int(feature)),
                    FeatureEvidence(0.05, 25600, 100, counts, np.linspace(0, 4, 13), dict.fromkeys(labels, 1.1), crops),
                )
    return found


def ablations(entries, random):
    rows = []
    for entry in entries:
        for block, one in entry.evidence.items():
            for feature in one.features[0][:3]:
                gate, logit = random.normal(size=2)
                rows.append((entry.key, block, int(feature), 0, 1.5, gate, gate * 0.9, logit, logit * 1.2))
    columns = ["image", "block", "feature", "patch", "gate"]
    columns += ["predicted_gate", "actual_gate", "predicted_logit", "actual_logit"]
    return pd.DataFrame(rows, columns=columns)


def validation():
    """Tables of the stages: layers, combinations, sweep."""
    layers = pd.DataFrame(
        [
            (b, score, m, 0.1 * b - 0.01 * b * b + 0.05 * i, 0.02, 40, b == 4 and i == 0)
            for m in METRICS
            for i, score in enumerate(("combined", "activation", "gradient"))
            for b in range(8)
        ],
        columns=["block", "score", "metric", "mean", "se", "n", "chosen"],
    ).assign(reference=0.15)
    combinations = pd.DataFrame(
        [(text, m, 0.2 + 0.01 * i, 0.02, 40, i == 2) for m in METRICS for i, text in enumerate(("4", "4 6", "4 6 8"))],
        columns=["layers", "metric", "mean", "se", "n", "chosen"],
    )
    sweep = pd.DataFrame(
        [
            (k, c, m, k * np.log(c) / 10, 0.02, 40, (k, c) == (0.5, 10))
            for m in METRICS
            for k in (0.1, 0.5, 1.0)
            for c in (2, 10, 50)
        ],
        columns=["kappa", "c_max", "metric", "mean", "se", "n", "chosen"],
    )
    return layers, combinations, sweep


def curves():
    return pd.DataFrame(
        [
            (v, mode, order, f, m := (1 - f) ** (2 + s if order == "MIF" else 0.5 - s / 2), m - 0.03, m + 0.03)
            for v, s in SHIFT.items()
            for mode in ("fill", "removed")
            for order in ("MIF", "LIF")
            for f in np.linspace(0, 1, 11)
        ],
        columns=["variant", "mode", "order", "fraction", "mean", "low", "high"],
    )


def full(n=12, **of_images):
    """A report with every part."""
    table, random = scores(n), np.random.default_rng(2)
    entries = images([f"image-{i:03d}" for i in range(n)], **of_images)
    decided, seeds = paired(table), [name for name in SHIFT if name.startswith("shuffled")]
    layers, combinations, sweep = validation()
    means = table.groupby("variant")[list(METRICS)].mean()
    shuffled = [
        (m, v, float(v.split()[1]) if v in seeds else None, means[m][v]) for m in METRICS for v in ("gated", *seeds)
    ]
    return Contents(
        title="Does the gate see the defect?",
        subtitle="A toy of twelve pictures",
        claims=[
            Claim(
                "The gate improves SRG on these images, and no control does as well.",
                holds=False,
                conditions=[
                    Condition("Better than vanilla (Holm p < .05).", True, "p < .001"),
                    Condition("Better than the strongest control.", False, "no SAE: difference 0.01, p = .4"),
                    Condition("The same sign in at least 3 of 4 modes.", None, "one mode was run"),
                ],
                effects=[Effect.of(decided, "gated", "srg", "vanilla")],
            )
        ],
        scores=table,
        variants=[
            *(Variant(name, role, f"What {name} is.") for name, role in ROLES.items()),
            *(Variant(name, "seed") for name in seeds),
        ],
        summary=summarize(table),
        paired={"vanilla": decided},
        layers=layers,
        combinations=combinations,
        sweep=sweep,
        curves=curves(),
        shuffled=pd.DataFrame(shuffled, columns=["metric", "variant", "seed", "mean"]),
        ranks=rank_test(table, "gated", seeds),
        images=entries,
        features=features(entries, random),
        evidence_of="gated",
        ablations=ablations(entries, random),
        settings={"gated blocks": (4, 8), "kappa": 0.5},
        versions={"fastfg": "0.0", "torch": "2.6"},
        command="fastfg study run toy.toml",
        notes=["These are not real images."],
        errors=pd.DataFrame([{"image": "image-003", "message": "the map is constant"}]),
    )
