"""The protocol of a study, from top to bottom: choose on validation images, then test, and judge the claim."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastfg.files import read_json_list, write_durably
from fastfg.study.claim import GATE, VANILLA
from fastfg.study.config import Config
from fastfg.study.judging import Judging
from fastfg.study.measures import CURVES, PRIMARY, Measure
from fastfg.study.selection import Choice, Means, choose_gate, choose_layers, layer_variants, rule
from fastfg.study.telling import Say
from fastfg.study.variants import Variant
from fastfg.types import METHODS, Gate

if TYPE_CHECKING:
    import pandas as pd

RULES, CHOICE = "rules.json", "choice.json"
PERMUTE_SEED = 1


class Outcome(NamedTuple):
    """The scores of a whole study.

    Attributes:
        layers, sweep: scores of the validation images, for the blocks one at a time, and for kappa and c_max.
        combined: (variants, scores of the validation images) for each comparison of sets of blocks.
        choice: the chosen gate.
        tests: {mode: scores of the test images}. rows: the test images' rows of the store.
        variants: those of the test. shuffled: the names of the shuffled ones. controls: of the others but vanilla.
    """

    layers: pd.DataFrame
    combined: list[tuple[Sequence[Variant], pd.DataFrame]]
    sweep: pd.DataFrame
    choice: Choice
    tests: Mapping[str, pd.DataFrame]
    rows: pd.DataFrame
    variants: list[Variant]
    shuffled: list[str]
    controls: list[str]


def run_protocol(judging: Judging, say: Say) -> Outcome:
    """Run what is missing of a study. Every process gets the same outcome."""
    config, protocol, test = judging.config, judging.config.protocol, judging.config.test
    record_rule(config, any(judging.store.shards.glob("*.parquet")), judging.images_hash)
    primary = Measure.of([PRIMARY], test.modes[0], judging.patches_per_step)

    def validate(title: str, variants: Sequence[Variant], limit: int | None = None) -> pd.DataFrame:
        rows = judging.scores(title, "validation", variants, primary, limit)
        return judging.table(rows, variants, primary)

    compared: list[tuple[Sequence[Variant], pd.DataFrame]] = []

    def score(title: str, variants: Sequence[Variant]) -> Means:
        compared.append((variants, validate(title, variants)))
        return common_means(compared[-1][1])

    singles = layer_variants(protocol)
    layers = validate("Every block, every score", singles, protocol.layer_images)
    chosen = choose_layers(protocol, score)
    choice = choose_gate(protocol, chosen, score)
    *combined, (_, sweep) = compared
    record_choice(config.run.out, choice)
    n, fewer = len(judging.parts.validation), choice.mean <= choice.vanilla
    say(f"Chosen on {choice.images} of {n} validation images: {describe(choice.gate)}")
    if fewer:
        say(f"On these images, its mean SRG is not above that of vanilla: {choice.mean:.4f} and {choice.vanilla:.4f}")

    variants, shuffled = _test_variants(config, choice.gate)
    tests, rows = _test(judging, variants, shuffled)
    controls = [one.name for one in variants if one.name not in (GATE, VANILLA)]
    names = [one.name for one in shuffled]
    return Outcome(layers, combined, sweep, choice, tests, rows, [*variants, *shuffled], names, controls)


def common_means(table: pd.DataFrame) -> Means:
    """The means over the images for which every variant has a score.

    Raises ValueError if these are less than half of the images: a choice by them would be one by what could be scored.
    """
    every = table.pivot(index="image", columns="variant", values=PRIMARY)
    scores = every.dropna()
    if 2 * len(scores) < len(every):
        missing = every.isna().sum().sort_values().index[-1]
        raise ValueError(
            f"protocol: expected scores of all variants for at least half of {len(every)} validation images, got "
            f"{len(scores)}; {missing!r} lacks most (see scores)"
        )
    return Means({str(name): float(mean) for name, mean in scores.mean().items()}, len(scores))


def describe(gate: Gate) -> str:
    """The gate in words."""
    blocks = f"block{'s' * (len(gate.layers) > 1)} {', '.join(map(str, gate.layers))}"
    return f"{blocks}, kappa {gate.kappa:g}, c_max {gate.c_max:g}, {gate.score}"


def measures_of(config: Config, patches_per_step: int) -> dict[str, list[Measure]]:
    """{mode: measures} of the test: the curves in every mode, and the other metrics in the first one."""
    test = config.test
    return {
        mode: Measure.of([*CURVES, *(test.metrics if mode == test.modes[0] else ())], mode, patches_per_step)
        for mode in test.modes
    }


def _test_variants(config: Config, gate: Gate) -> tuple[list[Variant], list[Variant]]:
    """Vanilla, the gate and its controls; and the gates with shuffled decoders."""
    made = {
        "gradient_x_residual": Variant("gradient x residual", replace(gate, score="gradient_x_residual")),
        "sae_error": Variant("SAE error", replace(gate, score="sae_error")),
        "frozen-decoder": Variant("frozen-decoder SAE", gate, "frozen-decoder"),
        "random-sae": Variant("random SAE", gate, "random"),
        "permuted": Variant("permuted gate", replace(gate, permute_seed=PERMUTE_SEED)),
        "blurred": Variant("blurred vanilla", replace(gate, blurred=True)),
    }
    made |= {name: Variant(name.replace("_", " "), method=name) for name in METHODS}
    controls = [made[name] for name in config.test.controls]
    seeds = range(config.run.seed, config.run.seed + config.test.shuffled)
    shuffled = [Variant(name, one) for name, one in gate.shuffled(seeds).items()]
    return [Variant(VANILLA), Variant(GATE, gate), *controls], shuffled


def _test(
    judging: Judging, variants: list[Variant], shuffled: list[Variant]
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Judge all variants on the test images: the shuffled ones by the curves alone."""
    import pandas as pd

    by_mode = measures_of(judging.config, judging.patches_per_step)
    every = [measure for measures in by_mode.values() for measure in measures]
    rows = [judging.scores("Test", "test", variants, every)]
    if shuffled:
        limit = judging.config.test.shuffled_images
        only_curves = [measure for measure in every if measure.metric in CURVES]
        rows.append(judging.scores("Test: shuffled decoders", "test", shuffled, only_curves, limit))
    joined = pd.concat(rows, ignore_index=True)
    tables = {mode: judging.table(joined, [*variants, *shuffled], measures) for mode, measures in by_mode.items()}
    return tables, joined


def record_rule(config: Config, begun: bool, images: str) -> None:
    """Write the rule of the choice before the first score, with the time. One that was changed later is added.

    Args:
        begun: whether the folder already holds scores.
        images: a hash of the validation and test images, to which the rule is applied.
    """
    file = config.run.out / RULES
    before = rules_of(config.run.out)
    text = rule(config)
    if not before or before[-1]["rule"] != text or before[-1].get("images", images) != images:
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        new = {"rule": text, "images": images, "written": now, "scores_existed": begun}
        write_durably(file, json.dumps([*before, new], indent=2).encode())


def rules_of(out: Path) -> list[dict[str, Any]]:
    """The rules that :func:`record_rule` has written, the latest last."""
    file = out / RULES
    return read_json_list(file, "rule", "written", "scores_existed") if file.exists() else []


def choices_of(out: Path) -> list[dict[str, Any]]:
    """The choices that :func:`record_choice` has written, the latest last."""
    file = out / CHOICE
    return read_json_list(file, *Choice._fields) if file.exists() else []


def record_choice(out: Path, choice: Choice) -> None:
    """Write the chosen gate before the first test image is read. Another choice, after a change, is added."""
    file = out / CHOICE
    found: dict[str, Any] = json.loads(json.dumps(choice._asdict() | {"gate": asdict(choice.gate)}))
    before = choices_of(out)
    if not before or before[-1] != found:
        write_durably(file, json.dumps([*before, found], indent=2).encode())
