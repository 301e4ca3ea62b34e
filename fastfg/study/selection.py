"""Choose the gate on validation images alone, by a rule that is written before the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from fastfg.study.config import Protocol
from fastfg.study.variants import Variant
from fastfg.types import Gate

RULE = """The gate is chosen on the validation images alone, by the highest mean of the primary score. All choices are \
compared on the images for which each of them has a score. Of equal means, the one that was named first counts.
1. Each block alone, with the scores {scores}, kappa {kappa:g} and c_max {c_max:g}{subset}. Of these, only the score \
{score!r} is chosen from, on all validation images: the best block is kept.
2. Blocks are added to it one at a time, always the one with the highest mean, as long as the mean rises and up to \
{max_layers} blocks{candidates}.
3. For these blocks, kappa of {kappas} and c_max of {c_maxes}.
The test images are not read before the choice is written down."""

Score = Callable[[str, Sequence[Variant]], Mapping[str, float]]  # title, variants -> {name: mean primary score}


class Choice(NamedTuple):
    """The chosen gate, its mean primary score on the validation images, and that of vanilla."""

    gate: Gate
    mean: float
    vanilla: float


def rule(protocol: Protocol) -> str:
    """The rule in words, for the record."""
    subset = f", on {protocol.layer_images} images" if protocol.layer_images else ""
    lists = ", ".join(_blocks(blocks) for blocks in protocol.combinations)
    return RULE.format(
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
    means = score("Blocks, one at a time", single)
    best = _best(single, means)
    while len(_layers(best)) < min(protocol.max_layers, len(protocol.layers)):
        others = [block for block in protocol.layers if block not in _layers(best)]
        larger = [_variant(gate_of(protocol, [*_layers(best), block])) for block in others]
        means = score(f"Combinations of {len(_layers(best)) + 1} blocks", [best, *larger])
        found = _best([best, *larger], means)
        if found == best:
            break
        best = found
    if listed:
        best = _best([best, *listed], score("Combinations of the list", [best, *listed]))
    return _layers(best)


def choose_gate(protocol: Protocol, layers: Iterable[int], score: Score) -> Choice:
    """The best kappa and c_max for ``layers``."""
    variants = sweep_variants(protocol, layers)
    means = score("kappa and c_max", [Variant("vanilla"), *variants])
    best = _best(variants, means)
    assert best.gate is not None
    return Choice(best.gate, means[best.name], means["vanilla"])


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
