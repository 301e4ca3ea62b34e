"""How often the paired statistics are right, by simulation: false alarms, coverage of the interval, power at the MDE.

    python -m bench.statistics                     the table, 2,000 studies per row
    python -m bench.statistics --results DIR       also append lines to DIR/cpu/statistics.jsonl

A study is ``n`` paired differences. In a grouped study, their intra-class correlation is .3 and the group sizes differ
by a factor of about five. ``alarms``: studies without an effect that have p < .05; 4% to 6% are wanted, less is certain
where few groups allow few p values. ``covered``: intervals that hold the true mean, of 95%. ``power``: studies whose
effect is the MDE, by the true standard deviation, with p < .05 (wanted: 80%). ``power, est.``: the effect is the MDE
that an earlier study of the same kind estimated. ``family``: studies of eight variants without an effect, correlated
by the common vanilla, in which any Holm p is below .05 (wanted: at most 5%).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.results import append
from fastfg.study.resampling import (
    Array,
    bootstrap_interval,
    detectable_effect,
    holm,
    sign_flip_p,
    standard_error,
)

ICC = 0.3
SHAPES: dict[str, Callable[[np.random.Generator, Any], Array]] = {  # mean 0, standard deviation 1
    "normal": lambda random, shape: random.standard_normal(shape),
    "heavy tails": lambda random, shape: random.standard_t(3, shape) / np.sqrt(3),
    "skewed": lambda random, shape: random.exponential(1, shape) - 1,
}


class Design(NamedTuple):
    """``n`` images in ``groups`` groups; 0: each image is a group of its own."""

    shape: str
    n: int
    groups: int = 0

    def group(self) -> np.ndarray[Any, Any]:
        """[n] the group of each image."""
        if not self.groups:
            return np.arange(self.n)
        shares = np.linspace(1, 5, self.groups).cumsum()
        return np.searchsorted(np.round(shares / shares[-1] * self.n), np.arange(self.n), side="right")

    def draw(self, random: np.random.Generator, studies: int) -> tuple[Array, Array]:
        """Totals and counts [G, studies] of differences with mean 0 and standard deviation 1."""
        noise, group = SHAPES[self.shape], self.group()
        d = noise(random, (self.n, studies))
        if self.groups:
            d = np.sqrt(ICC) * noise(random, (self.groups, studies))[group] + np.sqrt(1 - ICC) * d
        totals = np.zeros((group.max() + 1, studies))
        np.add.at(totals, group, d)
        return totals, np.repeat(np.bincount(group)[:, None].astype(float), studies, 1)

    def true_error(self) -> float:
        """The standard deviation of the mean difference."""
        sizes = np.bincount(self.group())
        return float(np.sqrt((ICC * (sizes**2).sum() + (1 - ICC) * self.n) if self.groups else self.n) / self.n)


DESIGNS = (
    *(Design("normal", n) for n in (6, 8, 12, 40)),
    *(Design("normal", *sizes) for sizes in ((40, 8), (40, 15), (120, 25))),
    *(Design(shape, *sizes) for shape in ("heavy tails", "skewed") for sizes in ((12, 0), (40, 0), (40, 15))),
)


def simulate(design: Design, studies: int, seed: int = 0, patterns: int = 1_999) -> dict[str, float]:
    """The shares of one row of the table. ``patterns``: random sign patterns and bootstrap samples per study."""
    random = np.random.default_rng(seed)
    totals, counts = design.draw(random, studies)
    groups = len(totals)
    low, high = bootstrap_interval(totals, counts, patterns)
    effect = detectable_effect(design.true_error(), groups)
    estimated = np.array([detectable_effect(1.0, groups)]) * standard_error(totals, counts)
    later, _ = design.draw(random, studies)
    variants, vanilla = [design.draw(random, studies)[0] for _ in range(8)], design.draw(random, studies)[0]
    p = np.stack([sign_flip_p(variant - vanilla, patterns * 10) for variant in variants])
    return {
        "alarms": float(np.mean(sign_flip_p(totals, patterns) < 0.05)),
        "covered": float(np.mean((low <= 0) & (high >= 0))),
        "power": float(np.mean(sign_flip_p(later + effect * counts, patterns) < 0.05)),
        "power, est.": float(np.mean(sign_flip_p(later + estimated * counts, patterns) < 0.05)),
        "family": float(np.mean([holm(study).min() < 0.05 for study in p.T])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2_000)
    parser.add_argument("--results", type=Path, metavar="DIR", help="append lines to DIR/cpu/statistics.jsonl")
    arguments = parser.parse_args()
    print("| differences | images | groups | alarms | covered | power | power, est. | family |")
    print("| --- |" + " ---: |" * 7)
    for design in DESIGNS:
        found = simulate(design, arguments.studies)
        sizes = [design.shape, str(design.n), str(design.groups or "")]
        print(f"| {' | '.join(sizes + [f'{share:.1%}' for share in found.values()])} |", flush=True)
        if arguments.results is not None:
            line = {"name": "statistics", "provider": "paired", "shape": design._asdict(), "dtype": "float64"}
            append(arguments.results, "cpu", line | {"median": None, "studies": arguments.studies} | found)


if __name__ == "__main__":
    main()
