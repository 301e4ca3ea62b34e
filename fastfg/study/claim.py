"""What a study may claim: the gate improves explanations only if four conditions hold, all fixed before the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastfg.report.contents import Claim, Condition
from fastfg.study import wording
from fastfg.study.conditions import Effects, better_than, better_than_every, effects_of, strongest_control, words
from fastfg.study.measures import ORDERS, PRIMARY
from fastfg.study.paired import paired
from fastfg.study.pairs import differences

if TYPE_CHECKING:
    import pandas as pd

GATE, VANILLA, SHUFFLED = "gate", "vanilla", "shuffled (mean of seeds)"
SIGNS = 0.75  # of the curves, in which the difference must have the same sign: 3 of 4


class Judgement(NamedTuple):
    """Whether the gate improves explanations.

    Attributes:
        claim: the answer in a sentence, and the conditions that it rests on.
        strongest: the control that the gate is ahead of by the least; None without controls.
        against_gate: the paired comparison of every other variant with the gate, by the primary score. Holm's
            correction counts all of them.
        signs: one row per compared variant, mode and order: the mean difference, positive where the gate is better.
    """

    claim: Claim
    strongest: str | None
    against_gate: pd.DataFrame
    signs: pd.DataFrame


def with_mean_of_shuffled(scores: pd.DataFrame, shuffled: Sequence[str]) -> pd.DataFrame:
    """``scores`` with one more variant: per image, the mean over the shuffled decoders. NaN where one has no score."""
    import pandas as pd

    own = scores[scores["variant"].isin(list(shuffled))]
    metrics = scores.attrs["metrics"]
    if not len(own):
        return scores
    means = own.groupby("image")[metrics].agg(lambda values: values.mean(skipna=False))
    means[own.groupby("image").size() < len(shuffled)] = float("nan")
    others = own.drop_duplicates("image").set_index("image").assign(variant=SHUFFLED, error=None)
    rows = others.assign(**{metric: means[metric] for metric in metrics}).reset_index()[list(scores.columns)]
    table = pd.concat([scores, rows.astype(scores.dtypes.to_dict())], ignore_index=True)
    table.attrs = scores.attrs
    return table


def judge_claim(tables: Mapping[str, pd.DataFrame], controls: Sequence[str], seed: int = 0) -> Judgement:
    """Judge ``gate`` by the scores of the test images.

    Args:
        tables: {mode: scores with the columns ``srg``, ``deletion``, ``insertion``}; the first mode is the primary one.
        controls: the variants that the gate must beat beside vanilla.
    """
    primary = next(iter(tables.values()))
    compared = primary[primary["variant"].isin([GATE, VANILLA, *controls])]
    compared.attrs = primary.attrs
    table = paired(compared, GATE, metrics=[PRIMARY], seed=seed)
    over = effects_of(table, GATE, PRIMARY)
    strongest = strongest_control(over, controls)
    against = [VANILLA, *([strongest] if strongest else [])]
    signs = _signs(tables, against)
    conditions = [better_than(over[name], strongest=name != VANILLA) for name in against]
    conditions.append(better_than_every(over, controls, set(compared.loc[compared[PRIMARY].notna(), "variant"])))
    needed = math.ceil(SIGNS * len(tables) * len(ORDERS))
    for name in against:
        own = signs[signs["against"] == name]
        good, n = int((own["gain"] > 0).sum()), len(own)
        shown = zip(own["order"], own["mode"], own["gain"].astype(float), strict=True)
        modes = "; ".join(f"{order}, {mode}: {wording.difference(gain)}" for order, mode, gain in shown)
        conditions.append(
            Condition(f"Ahead of {name} in at least {needed} of {n} curves", good >= needed, f"{good} of {n} ({modes})")
        )
    share = _share(primary, strongest) if strongest else float("nan")
    sentence, holds = _sentence(conditions, over, strongest, share)
    return Judgement(Claim(sentence, holds, conditions, [over[name] for name in against]), strongest, table, signs)


def _signs(tables: Mapping[str, pd.DataFrame], against: Sequence[str]) -> pd.DataFrame:
    """The gate's mean gain over each of ``against`` by the curve of each order in each mode, on common images."""
    import pandas as pd

    rows = []
    for mode, table in tables.items():
        for order, metric in ORDERS.items():
            scores = table.pivot(index="image", columns="variant", values=metric)
            for name in against:
                both = scores[[GATE, name]].dropna()
                gain = differences(both[GATE], both[name]).mean() * (-1 if order == "MIF" else 1)
                rows.append({"against": name, "mode": mode, "order": order, "gain": gain, "n": len(both)})
    return pd.DataFrame(rows, columns=["against", "mode", "order", "gain", "n"])


def _share(primary: pd.DataFrame, control: str) -> float:
    """The gain of ``control`` over vanilla as a share of that of the gate, on the images that all three have.

    NaN without such images, and where the gate has no gain on them.
    """
    means = primary.pivot(index="image", columns="variant", values=PRIMARY)[[GATE, VANILLA, control]].dropna().mean()
    gain = float(means[GATE] - means[VANILLA])
    return float(means[control] - means[VANILLA]) / gain if gain > 0 else float("nan")


def _sentence(conditions: Sequence[Condition], over: Effects, strongest: str | None, share: float) -> tuple[str, bool]:
    vanilla = over[VANILLA]
    effect = f"SRG, gate minus vanilla: {words(vanilla)}"
    if not all(condition.holds for condition in conditions):
        return f"{wording.NO_CLAIM} ({effect}): {wording.short_of([c.holds for c in conditions])}.", False
    assert strongest is not None  # else a condition fails
    control = over[strongest]
    ahead = wording.difference(control.difference, control.low, control.high)
    if control.n != vanilla.n:
        ahead += f" {wording.on_images(control.n, control.groups)}"
    return (
        f"The gate improves explanations ({effect}). It is better than the strongest control, {strongest}, by "
        f"{ahead}; {wording.share_of_gain(share)}.",
        True,
    )
