"""What a study may claim: the gate improves explanations only if four conditions hold, all fixed before the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastfg.report.contents import Claim, Condition, Effect
from fastfg.study import wording
from fastfg.study.measures import ORDERS, PRIMARY
from fastfg.study.paired import paired

if TYPE_CHECKING:
    import pandas as pd

GATE, VANILLA, SHUFFLED = "gate", "vanilla", "shuffled (mean of seeds)"
Rows = Mapping[str, Mapping[Any, Any]]  # {variant: its row of the paired comparison with the gate}
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
    rows = {str(row["variant"]): row for row in table.to_dict("records")}
    strongest = _strongest(rows, controls)
    against = [VANILLA, *([strongest] if strongest else [])]
    signs = _signs(tables, against)
    conditions = [_real(rows, name, name != VANILLA) for name in against]
    conditions.append(_every(rows, controls))
    needed = math.ceil(SIGNS * len(tables) * len(ORDERS))
    for name in against:
        own = signs[signs["against"] == name]
        good, n = int((own["gain"] > 0).sum()), len(own)
        shown = zip(own["order"], own["mode"], own["gain"].astype(float), strict=True)
        modes = "; ".join(f"{order}, {mode}: {wording.difference(gain)}" for order, mode, gain in shown)
        conditions.append(
            Condition(f"Ahead of {name} in at least {needed} of {n} modes", good >= needed, f"{good} of {n} ({modes})")
        )
    share = _share(primary, strongest) if strongest else float("nan")
    sentence, holds = _sentence(conditions, rows, strongest, share)
    effects = [Effect.of(table, name, PRIMARY, GATE).reversed() for name in against]
    return Judgement(Claim(sentence, holds, conditions, effects), strongest, table, signs)


def _strongest(rows: Rows, controls: Sequence[str]) -> str | None:
    """The control with the smallest gain of the gate over it."""
    ahead = {name: rows[name]["difference"] for name in controls if name in rows}  # its score less the gate's
    known = [name for name, difference in ahead.items() if difference == difference]
    return max(known, key=ahead.__getitem__, default=None)


def _real(rows: Rows, name: str, strongest: bool) -> Condition:
    """Whether the gate is better than variant ``name`` by the paired test."""
    row = rows[name]
    holds = row["verdict"] == "worse"  # than the gate
    detail = _words(row)
    text = wording.better_than(name, strongest=strongest)
    return Condition(text, holds, f"{detail}; {row['reason']}" if row["reason"] else detail)


def _every(rows: Rows, controls: Sequence[str]) -> Condition:
    """Whether the gate is better than each control that was asked for; one that was not tested counts as not beaten."""
    text = wording.better_than("every control")
    if not controls:
        return Condition(text, False, wording.NO_CONTROL)
    left = [name for name in controls if name not in rows or rows[name]["verdict"] != "worse"]
    why = [f"{name}: {_words(rows[name])}" if name in rows else name for name in left]
    beaten = f"{len(controls)} control{'s' * (len(controls) != 1)}"
    return Condition(text, not left, f"not better than {'; '.join(why)}" if left else beaten)


def _words(row: Mapping[Any, Any]) -> str:
    """The gate's gain over the variant of ``row``, with its interval, p value and number of images."""
    return wording.effect(-row["difference"], -row["high"], -row["low"], row["p_holm"], row["n"], row["groups"])


def _signs(tables: Mapping[str, pd.DataFrame], against: Sequence[str]) -> pd.DataFrame:
    """The gate's mean gain over each of ``against`` by the curve of each order in each mode, on common images."""
    import pandas as pd

    rows = []
    for mode, table in tables.items():
        for order, metric in ORDERS.items():
            scores = table.pivot(index="image", columns="variant", values=metric)
            for name in against:
                both = scores[[GATE, name]].dropna()
                gain = (both[GATE] - both[name]).mean() * (-1 if order == "MIF" else 1)
                rows.append({"against": name, "mode": mode, "order": order, "gain": gain, "n": len(both)})
    return pd.DataFrame(rows, columns=["against", "mode", "order", "gain", "n"])


def _share(primary: pd.DataFrame, control: str) -> float:
    """The gain of ``control`` over vanilla as a share of that of the gate, on the images that all three have."""
    means = primary.pivot(index="image", columns="variant", values=PRIMARY)[[GATE, VANILLA, control]].dropna().mean()
    return float((means[control] - means[VANILLA]) / (means[GATE] - means[VANILLA]))


def _sentence(conditions: Sequence[Condition], rows: Rows, strongest: str | None, share: float) -> tuple[str, bool]:
    effect = f"SRG, gate minus vanilla: {_words(rows[VANILLA])}"
    failed = sum(not condition.holds for condition in conditions)
    if not failed:
        assert strongest is not None  # else a condition fails
        row = rows[strongest]
        ahead = wording.difference(-row["difference"], -row["high"], -row["low"])
        if row["n"] != rows[VANILLA]["n"]:
            ahead += f" {wording.on_images(row['n'], row['groups'])}"
        return (
            f"The gate improves explanations ({effect}). It is better than the strongest control, {strongest}, by "
            f"{ahead}; {wording.share_of_gain(share)}.",
            True,
        )
    return f"{wording.NO_CLAIM} ({effect}): {failed} of {len(conditions)} conditions fail.", False
