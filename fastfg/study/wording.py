"""The words of claims: the same for a study and for the comparison of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastfg.report.table import equals, in_groups, of_all, signed
from fastfg.study.resampling import ALPHA

NO_CLAIM = "No improvement can be claimed"
NO_CONTROL = "no control was judged"


def better_than(variant: str, *, strongest: bool = False, metric: str = "") -> str:
    """The condition that a method is better than ``variant``, which may be the strongest control.

    >>> better_than("random", strongest=True), better_than("vanilla", metric="SRG")
    ('Better than the strongest control, random (Holm p < .05)', 'SRG: better than vanilla (Holm p < .05)')
    """
    what = f"{'the strongest control, ' if strongest else ''}{variant} (Holm p < {f'{ALPHA:g}'.lstrip('0')})"
    return f"{metric}: better than {what}" if metric else f"Better than {what}"


def difference(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    """A mean difference with its interval, if there is one.

    >>> difference(0.0213, -0.01, 0.05), difference(-2e-6), difference(float("nan"))
    ('+0.0213 [-0.0100, +0.0500]', '-2.00e-06', 'no difference can be computed')
    """
    if value != value:
        return "no difference can be computed"
    return signed(value) if low != low else f"{signed(value)} [{signed(low)}, {signed(high)}]"


def holm(p: float) -> str:
    """A corrected p value.

    >>> holm(0.25), holm(0.0002), holm(float("nan"))
    ('Holm p = .250', 'Holm p < .001', 'not tested')
    """
    return "not tested" if p != p else f"Holm p {equals(p)}"


def effect(value: float, low: float, high: float, p: float, n: int, groups: int | None = None, missing: int = 0) -> str:
    """A difference, its p value and the number of images, of which some may be missing, and which may be in groups.

    >>> effect(0.02, -0.01, 0.05, 0.25, 12, 3)
    '+0.0200 [-0.0100, +0.0500], Holm p = .250, n = 12 in 3 groups'
    >>> effect(0.02, -0.01, 0.05, 0.25, 12, missing=48)
    '+0.0200 [-0.0100, +0.0500], Holm p = .250, n = 12 of 60'
    """
    return f"{difference(value, low, high)}, {holm(p)}, n = {of_all(n, missing, groups)}"


def on_images(n: int, groups: int | None = None) -> str:
    """The images that a difference was found on, where they are not those of the difference before it.

    >>> on_images(6), on_images(6, 1)
    ('on 6 images', 'on 6 images in 1 group')
    """
    return in_groups(f"on {n} image{'s' * (n != 1)}", n, groups)


def worse_than(metrics: Mapping[str, Sequence[str]]) -> str:
    """What a method is worse than. ``metrics``: {variant: the metrics by which it is worse}.

    >>> worse_than({"vanilla": ["SaCo"], "random": ["SRG", "SaCo"]})
    'worse than vanilla by SaCo and than random by SRG, SaCo'
    """
    joined = {name: ", ".join(titles) for name, titles in metrics.items()}
    return f"worse {' and '.join(f'than {name} by {titles}' for name, titles in joined.items())}"


def without_scores(controls: Sequence[str]) -> str:
    """Which controls have no scores.

    >>> without_scores(["random"]), without_scores(["random", "centre"])
    ('random has no scores', 'random, centre have no scores')
    """
    return f"{', '.join(controls)} {'has' if len(controls) == 1 else 'have'} no scores"


def share_of_gain(share: float) -> str:
    """How much of the gate's gain over vanilla a control has, too. NaN: not known.

    >>> share_of_gain(0.944), share_of_gain(-0.2)
    ('that control alone has 94% of the gain over vanilla', 'that control alone has no gain over vanilla')
    >>> share_of_gain(0.997)
    'that control alone has over 99% of the gain over vanilla'
    >>> share_of_gain(float("nan"))
    "that control's share of the gain over vanilla is not known"
    """
    if share != share:
        return "that control's share of the gain over vanilla is not known"
    some = "over 99%" if 0.99 < share < 1 else "less than 1%" if share < 0.01 else f"{share:.0%}"
    return f"that control alone has {f'{some} of the' if share > 0 else 'no'} gain over vanilla"


def short_of(conditions: Sequence[bool | None]) -> str:
    """How many conditions of a claim fail, and how many could not be tested (None).

    >>> short_of([True, False, False]), short_of([True, None])
    ('2 of 3 conditions fail', '1 of 2 conditions could not be tested')
    >>> short_of([False, None, True])
    '1 of 3 conditions fails, 1 could not be tested'
    """
    failed, open_ = sum(holds is False for holds in conditions), sum(holds is None for holds in conditions)
    of = f"of {len(conditions)} conditions"
    if not failed:
        return f"{open_} {of} could not be tested"
    said = f"{failed} {of} fail{'s' * (failed == 1)}"
    return f"{said}, {open_} could not be tested" if open_ else said
