"""Choose the gate on validation images alone, by a rule that is written before the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from fastfg.study.config import Config, Protocol
from fastfg.study.variants import Variant
from fastfg.types import Gate

RULE = """\
The primary score is SRG with removed patches treated as {mode!r}, in {steps} steps; the other modes: {modes}. The \
class that is explained: {target}. {validation} validation and {test} test images. Controls: {controls}, and \
{shuffled} shuffled decoders on {shuffled_images} test images.
The gate is chosen on the validation images alone, by the highest mean of the primary score, among the blocks \
{layers}. All choices are compared on the images for which each of them has a score. Of equal means, the first counts.
1. Each block alone, with the scores {scores}, kappa {kappa:g} and c_max {c_max:g}{subset}. Of these, only the score \
{score!r} is chosen from, on all validation images: the best block is kept.
2. Blocks are added to it one at a time, always the one with the highest mean, as long as the mean rises and up to \
{max_layers} blocks{candidates}.
3. For these blocks, kappa of {kappas} and c_max of {c_maxes}.
The test images are not read before the choice is written down.
"The gate improves explanations" is claimed only if its primary score is better than those of vanilla and of every \
control (Holm p < .05, over all of these comparisons), and if it is ahead of vanilla and of the strongest control in \
three quarters of the curves (each mode, most and least important patches first)."""


class Means(NamedTuple):
    """{variant: mean primary score} over the images for which all of them have a score, and the number of these."""

    of: Mapping[str, float]
    images: int


Score = Callable[[str, Sequence[Variant]], Means]  # title, variants -> their means


class Choice(NamedTuple):
    """The chosen gate, its mean primary score on the validation images, that of vanilla, and the number of images."""

    gate: Gate
    mean: float
    vanilla: float
    images: int


def rule(config: Config) -> str:
    """The rule in words, for the record."""
    protocol, test = config.protocol, config.test
    subset = f", on {protocol.layer_images} images" if protocol.layer_images else ""
    lists = ", ".join(_blocks(blocks) for blocks in protocol.combinations)
    return RULE.format(
        mode=test.modes[0],
        steps=test.steps,
        modes=", ".join(test.modes[1:]) or "none",
        target=config.model.target,
        validation=config.data.validation or "all",
        test=config.data.test or "all",
        controls=", ".join(test.controls) or "none",
        shuffled=test.shuffled,
        shuffled_images=test.shuffled_images or "all",
        layers=", ".join(map(str, protocol.layers)),
        scores=", ".join(protocol.scores),
        score=protocol.score,
        kappa=protocol.start_kappa,
        c_max=protocol.start_c_max,
        subset=subset,
        max_layers=protocol.max_layers,
        candidates=f"; the sets {lists} compete with them" if lists else "",
        kappas=", ".join(f"{value:g}" for value in protocol.kappa),
        c_maxes=", ".join(f"{value:g}" for value in protocol.c_max),
    )


def gate_of(protocol: Protocol, layers: Iterable[int], score: str | None = None) -> Gate:
    """The gate of some blocks with the settings that the protocol starts from."""
    kappa, c_max = protocol.start_kappa, protocol.start_c_max
    return Gate(tuple(sorted(layers)), kappa, c_max, score or protocol.score)


def layer_variants(protocol: Protocol) -> list[Variant]:
    """Vanilla, and every block with every score."""
    gates = [(score, block) for score in protocol.scores for block in protocol.layers]
    return [Variant("vanilla"), *(_variant(gate_of(protocol, [block], score)) for score, block in gates)]


def sweep_variants(protocol: Protocol, layers: Iterable[int]) -> list[Variant]:
    """The chosen blocks with every kappa and c_max."""
    start = gate_of(protocol, layers)
    pairs = product(protocol.kappa, protocol.c_max)
    return [_variant(replace(start, kappa=kappa, c_max=c_max)) for kappa, c_max in pairs]


def choose_layers(protocol: Protocol, score: Score) -> tuple[int, ...]:
    """The blocks to gate: greedily, and from the candidate list. ``score`` judges variants on validation images."""
    single = [_variant(gate_of(protocol, [block])) for block in protocol.layers]
    listed = [_variant(gate_of(protocol, blocks)) for blocks in protocol.combinations]
    means = score("Blocks, one at a time", single).of
    best = _best(single, means)
    while len(_layers(best)) < min(protocol.max_layers, len(protocol.layers)):
        others = [block for block in protocol.layers if block not in _layers(best)]
        larger = [_variant(gate_of(protocol, [*_layers(best), block])) for block in others]
        means = score(f"Combinations of {len(_layers(best)) + 1} blocks", [best, *larger]).of
        found = _best([best, *larger], means)
        if found == best:
            break
        best = found
    rivals = list(dict.fromkeys([best, *listed]))  # the list may hold what was found, or one set twice
    if len(rivals) > 1:
        best = _best(rivals, score("Combinations of the list", rivals).of)
    return _layers(best)


def choose_gate(protocol: Protocol, layers: Iterable[int], score: Score) -> Choice:
    """The best kappa and c_max for ``layers``."""
    variants = sweep_variants(protocol, layers)
    means = score("kappa and c_max", [Variant("vanilla"), *variants])
    best = _best(variants, means.of)
    assert best.gate is not None
    return Choice(best.gate, means.of[best.name], means.of["vanilla"], means.images)


def _best(variants: Sequence[Variant], means: Mapping[str, float]) -> Variant:
    """The variant with the highest mean; of equal ones the first."""
    known = [variant for variant in variants if means[variant.name] == means[variant.name]]
    if not known:
        raise ValueError("protocol: expected a validation image with a score, got none (see errors.parquet)")
    return max(known, key=lambda variant: means[variant.name])


def _variant(gate: Gate) -> Variant:
    text = f"{gate.score}, {_blocks(gate.layers)}, kappa {gate.kappa:g}, c_max {gate.c_max:g}"
    return Variant(text, gate)


def _layers(variant: Variant) -> tuple[int, ...]:
    assert variant.gate is not None
    return variant.gate.layers


def _blocks(layers: Sequence[int]) -> str:
    return f"block{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
