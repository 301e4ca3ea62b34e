"""The choice of a gate: greedy combinations, candidates, kappa and c_max, by a toy score."""

import math

import pytest

from fastfg.study.config import Config, Protocol
from fastfg.study.selection import Means, choose_gate, choose_layers, layer_variants, rule

PROTOCOL = Protocol(layers=[1, 2, 3], kappa=[0.1, 1.0], c_max=[2.0, 10.0], max_layers=3)


class Toy:
    """Scores by the blocks of a gate, and by kappa and c_max; remembers what was asked."""

    def __init__(self, by_layers, best=(1.0, 2.0)):
        self.by_layers, self.best, self.asked = by_layers, best, []

    def __call__(self, title, variants):
        self.asked.append([variant.gate and variant.gate.layers for variant in variants])
        return Means({variant.name: self.score(variant.gate) for variant in variants}, 9)

    def score(self, gate):
        if gate is None:
            return 0.0
        return self.by_layers.get(gate.layers, 0.0) + ((gate.kappa, gate.c_max) == self.best) * 0.01


def test_blocks_are_added_as_long_as_the_mean_rises():
    toy = Toy({(1,): 0.1, (2,): 0.3, (3,): 0.2, (1, 2): 0.2, (2, 3): 0.4, (1, 2, 3): 0.35})
    assert choose_layers(PROTOCOL, toy) == (2, 3)
    assert toy.asked == [[(1,), (2,), (3,)], [(2,), (1, 2), (2, 3)], [(2, 3), (1, 2, 3)]]


def test_at_most_max_layers():
    toy = Toy({(2,): 0.3, (2, 3): 0.4, (1, 2, 3): 0.5})
    assert choose_layers(PROTOCOL.model_copy(update={"max_layers": 2}), toy) == (2, 3)
    assert choose_layers(PROTOCOL.model_copy(update={"max_layers": 1}), toy) == (2,)


def test_of_equal_means_the_first_counts():
    assert choose_layers(PROTOCOL, Toy({})) == (1,)


def test_candidates_compete():
    protocol = PROTOCOL.model_copy(update={"combinations": [[1, 3]], "max_layers": 1})
    assert choose_layers(protocol, Toy({(2,): 0.3, (1, 3): 0.31})) == (1, 3)
    assert choose_layers(protocol, Toy({(2,): 0.3, (1, 3): 0.3})) == (2,)


def test_a_candidate_that_was_found_already_is_not_compared_with_itself():
    toy = Toy({(2,): 0.3, (2, 3): 0.4})
    protocol = PROTOCOL.model_copy(update={"combinations": [[3, 2], [1, 3], [3, 1]], "max_layers": 2})
    assert choose_layers(protocol, toy) == (2, 3)
    assert toy.asked[-1] == [(2, 3), (1, 3)]
    protocol = PROTOCOL.model_copy(update={"combinations": [[2, 3]], "max_layers": 2})
    assert choose_layers(protocol, toy) == (2, 3)
    assert toy.asked[-1] == [(2,), (1, 2), (2, 3)]


def test_a_variant_without_a_score_is_not_chosen():
    assert choose_layers(PROTOCOL, Toy({(1,): math.nan, (3,): 0.1, (1, 3): math.nan})) == (3,)
    with pytest.raises(ValueError, match="expected a validation image with a score"):
        choose_layers(PROTOCOL, Toy(dict.fromkeys([(1,), (2,), (3,)], math.nan)))


def test_kappa_and_c_max():
    choice = choose_gate(PROTOCOL, (2, 3), Toy({(2, 3): 0.4}))
    assert (choice.gate.layers, choice.gate.kappa, choice.gate.c_max) == ((2, 3), 1.0, 2.0)
    assert choice.mean == pytest.approx(0.41)
    assert choice.vanilla == 0.0
    assert choice.images == 9


def test_every_block_with_every_score():
    variants = layer_variants(PROTOCOL)
    assert len(variants) == 1 + 3 * 3
    assert len({variant.name for variant in variants}) == len(variants)


def config(**changes):
    parts = {
        "title": "t",
        "data": {"manifest": "m"},
        "model": {"name": "x"},
        "saes": {"train": {}},
        "run": {"out": "o"},
    }
    return Config.model_validate(parts | {"protocol": PROTOCOL.model_dump()} | changes)


def test_the_rule_names_what_it_depends_on():
    protocol = PROTOCOL.model_copy(update={"combinations": [[1, 2]], "layer_images": 7}).model_dump()
    text = rule(config(protocol=protocol))
    for part in ("0.1, 1", "2, 10", "blocks 1, 2", "7 images", "up to 3 blocks", "'mean'", "sae_error", "19 shuffled"):
        assert part in text
    first = rule(config())
    for changes in (
        {"test": {"modes": ["removed", "mean"]}},
        {"test": {"controls": ["random"]}},
        {"test": {"steps": 5}},
        {"data": {"manifest": "m", "test": 5}},
        {"model": {"name": "x", "target": "label"}},
        {"protocol": protocol},
    ):
        assert rule(config(**changes)) != first
