"""Turn the outcome of a study into what its report shows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fastfg
from fastfg.report.contents import Contents
from fastfg.report.contents import Variant as Described
from fastfg.report.versions import versions
from fastfg.study.claim import GATE, SHUFFLED, VANILLA, Judgement, judge_claim, with_mean_of_shuffled
from fastfg.study.config import Protocol
from fastfg.study.gallery import gallery, with_maps
from fastfg.study.judging import Judging
from fastfg.study.measures import ORDERS, PRIMARY, curves
from fastfg.study.paired import paired
from fastfg.study.prepare import sizes
from fastfg.study.protocol import Outcome, describe, measures_of
from fastfg.study.rank import rank_test
from fastfg.study.selection import layer_variants, sweep_variants
from fastfg.study.statistics import metric_of, summarize
from fastfg.study.telling import Track

if TYPE_CHECKING:
    import pandas as pd

ABOUT = {
    VANILLA: "TransMM (Chefer et al. 2021), without a gate",
    GATE: "Feature-Gradient Attribution with the chosen gate",
    "gradient x residual": "the same gate with g . x, without an SAE",
    "SAE error": "the same gate with what the SAE leaves out of x",
    "frozen-decoder SAE": "the same gate with an SAE whose dictionary stays random",
    "random SAE": "the same gate with an SAE that is random but for a scale",
    "permuted gate": "the same gates on other patches",
    "blurred vanilla": "vanilla under a blur that changes it as much as the gate does",
    "random": "uniform noise",
    "centre": "a Gaussian in the middle of the image",
    SHUFFLED: "the same gate with decoder rows that belong to other features, mean over seeds",
}


def judgement(outcome: Outcome, seed: int) -> tuple[Judgement, dict[str, pd.DataFrame]]:
    """The claim, and the test's scores {mode: table} with the mean of the shuffled decoders as one variant."""
    tables = {mode: with_mean_of_shuffled(table, outcome.shuffled) for mode, table in outcome.tests.items()}
    controls = [*outcome.controls, *([SHUFFLED] if outcome.shuffled else [])]
    return judge_claim(tables, controls, seed), tables


def contents(judging: Judging, outcome: Outcome, command: str, track: Track) -> Contents:
    """What the report of a study shows."""
    config = judging.config
    judged, tables = judgement(outcome, config.run.seed)
    shown = _joined(tables, outcome.shuffled)
    names = with_maps(outcome, judged)
    scores = _joined(tables, [name for name in outcome.shuffled if name not in names])
    metrics = shown.attrs["metrics"]
    directions = _directions(metrics)
    options: dict[str, Any] = {"metrics": metrics, "higher_is_better": directions}
    return Contents(
        title=config.title,
        subtitle=f"Feature-Gradient Attribution, fastfg {fastfg.__version__}",
        claims=[judged.claim],
        scores=scores,
        metrics=metrics,
        titles=_titles(metrics) | {PRIMARY: _titles(metrics)[metrics[0]]},
        higher_is_better=directions,
        variants=_described(scores, outcome.shuffled),
        summary=summarize(shown, VANILLA, metrics=metrics),
        paired={
            VANILLA: paired(shown, VANILLA, seed=config.run.seed, **options),
            GATE: judged.against_gate,
        },
        layers=_layers(judging, outcome),
        combinations=_combinations(outcome),
        sweep=_sweep(judging, outcome),
        curves=_curves(judging, outcome),
        shuffled=_shuffled(outcome),
        ranks=_ranks(outcome),
        images=gallery(judging, outcome, names, track),
        difference=(VANILLA, GATE),
        settings=_settings(judging, outcome),
        versions=versions(),
        command=command,
        notes=_notes(judging),
        errors=judging.store.failures().to_pandas(),
    )


def _joined(tables: Mapping[str, pd.DataFrame], hidden: Sequence[str]) -> pd.DataFrame:
    """One table of all modes, without the variants ``hidden``: a metric of a mode is the column ``metric (mode)``."""
    found: pd.DataFrame | None = None
    columns: list[str] = []
    for mode, table in tables.items():
        names = {metric: f"{metric} ({mode})" for metric in table.attrs["metrics"]}
        own = table[~table["variant"].isin(list(hidden))].rename(columns=names)
        columns += names.values()
        if found is None:
            found = own
        else:
            at = ["image", "variant"]
            found = found.merge(own[[*at, *names.values()]], on=at, how="left", validate="one_to_one")
    assert found is not None
    found.attrs["metrics"] = columns
    return found


def _directions(columns: Sequence[str]) -> dict[str, bool]:
    from fastfg.metrics import METRICS

    return {column: METRICS[metric_of(column)].higher_is_better for column in columns}


def _titles(columns: Sequence[str]) -> dict[str, str]:
    from fastfg.metrics import METRICS

    orders = {metric: order for order, metric in ORDERS.items()}
    found = {}
    for column in columns:
        metric = metric_of(column)
        title = METRICS[metric].title
        found[column] = f"{title}{f', {orders[metric]}' if metric in orders else ''}{column[len(metric) :]}"
    return found


def _described(scores: pd.DataFrame, shuffled: Sequence[str]) -> list[Described]:
    roles = {VANILLA: "baseline", GATE: "method"} | dict.fromkeys(shuffled, "seed")
    names = list(dict.fromkeys(scores["variant"]))
    about = ABOUT | dict.fromkeys(shuffled, "the same gate with the shuffled decoder of one seed")
    return [Described(name, roles.get(name, "control"), about.get(name, "")) for name in names]


def _layers(judging: Judging, outcome: Outcome) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for variant in layer_variants(judging.config.protocol)[1:]:
        assert variant.gate is not None
        named = {"block": variant.gate.layers[0], "score": variant.gate.score}
        rows.append(named | _mean(outcome.layers, variant.name) | {"reference": _mean(outcome.layers, VANILLA)["mean"]})
    return pd.DataFrame(rows)


def _combinations(outcome: Outcome) -> pd.DataFrame:
    import pandas as pd

    rows: dict[tuple[int, ...], dict[str, Any]] = {}
    for variants, table in outcome.combined:
        for variant in variants:
            assert variant.gate is not None
            layers = variant.gate.layers
            named = {"layers": ", ".join(map(str, layers)), "chosen": layers == outcome.choice.gate.layers}
            rows[layers] = named | _mean(table, variant.name)
    return pd.DataFrame(list(rows.values()))


def _sweep(judging: Judging, outcome: Outcome) -> pd.DataFrame:
    import pandas as pd

    gate, rows = outcome.choice.gate, []
    for variant in sweep_variants(judging.config.protocol, gate.layers):
        assert variant.gate is not None
        named = {"kappa": variant.gate.kappa, "c_max": variant.gate.c_max}
        rows.append(named | _mean(outcome.sweep, variant.name) | {"chosen": variant.gate == gate})
    return pd.DataFrame(rows)


def _mean(table: pd.DataFrame, variant: str) -> dict[str, Any]:
    """Mean, standard error and number of the primary scores of one variant."""
    values = table.loc[table["variant"] == variant, PRIMARY].dropna()
    return {"metric": PRIMARY, "mean": values.mean(), "se": values.sem(), "n": len(values)}


def _curves(judging: Judging, outcome: Outcome) -> pd.DataFrame:
    import pandas as pd

    names = {judging.identity(variant): variant.name for variant in outcome.variants}
    names = {identity: name for identity, name in names.items() if name not in outcome.shuffled}
    found = []
    for measures in measures_of(judging.config, judging.patches_per_step).values():
        (primary,) = (measure for measure in measures if measure.metric == PRIMARY)
        found.append(curves(outcome.rows, names, primary))
    return pd.concat(found, ignore_index=True)


def _shuffled(outcome: Outcome) -> pd.DataFrame | None:
    """The mean primary score per seed, and that of the gate, on the images for which all of them have a score."""
    import pandas as pd

    if not outcome.shuffled:
        return None
    mode, table = next(iter(outcome.tests.items()))
    seeds = {variant.name: variant.gate.shuffle_seed for variant in outcome.variants if variant.gate}
    scores = table.pivot(index="image", columns="variant", values=PRIMARY)[[GATE, *outcome.shuffled]].dropna()
    rows = [
        {"metric": PRIMARY, "mode": mode, "variant": name, "seed": seeds[str(name)], "mean": mean, "n": len(scores)}
        for name, mean in scores.mean().items()
    ]
    return pd.DataFrame(rows)


def _ranks(outcome: Outcome) -> pd.DataFrame | None:
    if not outcome.shuffled:
        return None
    table = next(iter(outcome.tests.values()))
    return rank_test(table, GATE, outcome.shuffled, metrics=[PRIMARY])


def _settings(judging: Judging, outcome: Outcome) -> dict[str, object]:
    config = judging.config
    found: dict[str, object] = {"chosen gate": describe(outcome.choice.gate), "model": config.model.name}
    found |= sizes(judging.parts)
    for table, part in (("saes", config.saes), ("protocol", config.protocol), ("test", config.test)):
        for name, value in part.model_dump(exclude_none=True).items():
            found[f"{table}: {name.replace('_', ' ')}"] = value
    return found | {"seed": config.run.seed}


def _notes(judging: Judging) -> list[str]:
    from fastfg.study.protocol import choices_of, rules_of

    choices, rules = choices_of(judging.config.run.out), rules_of(judging.config.run.out)
    found = [f"The rule of the choice, written {rules[-1]['written']}: {rules[-1]['rule']}"]
    if len(rules) > 1 and rules[-1]["rule"] == rules[-2]["rule"] and rules[-1]["scores_existed"]:
        found.append(
            "The validation or test images, or their groups, were changed after scores had been computed in this "
            "folder. The result is then not independent of what was seen before."
        )
    elif rules[-1]["scores_existed"]:
        found.append(
            "This rule was written after scores had been computed in this folder. The choice is then not independent "
            "of what was seen before."
        )
    if len(choices) > 1:
        found.append(f"This is the choice number {len(choices)} in this folder: choice.json has the earlier ones.")
    if choices[-1]["mean"] <= choices[-1]["vanilla"]:
        found.append(
            f"On the validation images, the chosen gate's mean SRG is not above that of vanilla: "
            f"{choices[-1]['mean']:.4f} and {choices[-1]['vanilla']:.4f}, on {choices[-1]['images']} images."
        )
    found += _at_the_edge(judging.config.protocol, choices[-1]["gate"])
    found += [*_about_saes(judging), *_about_images(judging)]
    if judging.parts.unlearned:
        found.append(f"{judging.parts.unlearned}.")
    groups = judging.parts.images.loc[judging.parts.test, "group"]
    if not judging.config.data.by_group and bool((groups != "").any()):
        found.append(
            f"The test images are of {groups.nunique()} known groups, which the statistics do not use (by_group = "
            "false). Images of one group are not independent, so intervals are too narrow and p values too small."
        )
    elif bool((groups != "").any()) and bool((groups == "").any()):
        n = int((groups == "").sum())
        found.append(f"{n} of {len(groups)} test images have no group: each counts as a group of its own.")
    n = judging.config.test.shuffled
    if n and (limit := judging.config.test.shuffled_images) and limit < len(judging.parts.test):
        found.append(f"The {n} shuffled decoders were judged on {limit} test images or a few more, not on all.")
    return found


def _at_the_edge(protocol: Protocol, gate: Mapping[str, float]) -> list[str]:
    """That a value was chosen beyond which none was compared."""
    found = []
    for name, values in (("kappa", protocol.kappa), ("c_max", protocol.c_max)):
        for word, end in (("largest", max(values)), ("smallest", min(values))):
            if gate[name] == end and len(set(values)) > 1:
                found.append(
                    f"{name} {end:g} was chosen, the {word} that was compared: one beyond it may score higher."
                )
    return found


def _about_saes(judging: Judging) -> list[str]:
    """That nothing is known of the images that SAEs from elsewhere were trained on, or what is."""
    found = []
    for kind, folder in judging.config.saes.folders.items():
        counts = {(sae.provenance.get("data") or {}).get("images") for sae in judging.parts.saes.get(kind, {}).values()}
        known = [n for n in counts if isinstance(n, int)]
        images = f"{max(known)} images" if known else "images that it does not name"
        found.append(
            f"The SAEs {kind} are from {folder}, trained on {images}. Whether validation or test images of this study "
            "are among them is not known."
        )
    return found


def _about_images(judging: Judging) -> list[str]:
    """What limits what the scores say: images that could not be read, and classes that are not there."""
    failed, found = set(judging.store.failures().to_pandas()["key"]), []
    for split, keys in (("validation", judging.parts.validation), ("test", judging.parts.test)):
        if lost := len(failed.intersection(keys)):
            found.append(f"{lost} of {len(keys)} {split} images could not be read and have no scores (see Errors).")
    if lost := len(judging.parts.unread):
        n = len(judging.parts.training)
        found.append(f"{lost} of {n} training images could not be read and were not trained on (see Errors).")
    given = judging.parts.images.loc[judging.parts.test, "label"]
    labels = set(given) - {""}
    if judging.parts.labels and (unknown := sorted(labels.difference(judging.parts.labels))):
        n, shown = int(given.isin(unknown).sum()), ", ".join(map(repr, unknown[:3])) + ", ..." * (len(unknown) > 3)
        found.append(f"{n} of {len(given)} test images have labels that are no classes of the model: {shown}.")
    if len(labels) == 1:
        found.append(f"All test images with a label are of one class, {labels.pop()!r}: nothing is said of others.")
    return found


def command_line() -> str:
    """The command that was given, as text."""
    return " ".join(["fastfg", *sys.argv[1:]])
