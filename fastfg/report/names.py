"""What metrics and variants are called, in which order they stand, and which direction is better."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from fastfg.metrics import METRICS
from fastfg.metrics.choose import RESERVED
from fastfg.report.contents import ROLES, Contents, Variant

GROUPS = {"baseline": "Baseline", "method": "Method", "control": "Controls", "seed": "Seeds", "other": "Others"}


class Names:
    """The names of one report.

    Args:
        contents: the report.
    """

    def __init__(self, contents: Contents) -> None:
        self.contents = contents

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics to show, the primary one first."""
        c = self.contents
        if c.metrics is not None:
            return list(c.metrics)
        if c.summary is not None:
            return list(dict.fromkeys(c.summary["metric"]))
        known = {*METRICS, *c.titles, *c.higher_is_better, *c.scores.attrs.get("metrics", ())}
        return [name for name in c.scores.columns if name in known and name not in RESERVED]

    @cached_property
    def variants(self) -> dict[str, Variant]:
        """{name: Variant} by role, in the order that was given. Variants without a description are ``other``."""
        given = {one.name: one for one in self.contents.variants}
        for name in dict.fromkeys(self.contents.scores["variant"]):
            given.setdefault(name, Variant(name, "other" if self.contents.variants else _likely_role(name)))
        return dict(sorted(given.items(), key=lambda item: ROLES.index(item[1].role)))

    def of_role(self, *roles: str) -> list[str]:
        """The variants with one of ``roles``."""
        return [name for name, one in self.variants.items() if one.role in roles]

    def image(self, key: str) -> str:
        """What the image ``key`` is called: as its file, with the key where another file has the same name."""
        return self._images.get(key, key)

    @cached_property
    def _images(self) -> dict[str, str]:
        images = self.contents.images
        names = Counter(image.name for image in images)
        return {one.key: one.name if names[one.name] == 1 else f"{one.name} (key {one.key})" for one in images}

    def title(self, metric: str) -> str:
        """What ``metric`` is called."""
        own = self.contents.titles.get(metric)
        return own or (METRICS[metric].title if metric in METRICS else metric)

    def higher_is_better(self, metric: str) -> bool | None:
        """Whether more of ``metric`` is better; None if nothing says it."""
        own = self.contents.higher_is_better
        if metric in own:
            return own[metric]
        return METRICS[metric].higher_is_better if metric in METRICS else None

    def heading(self, metric: str) -> str:
        """The title of ``metric`` with an arrow towards the better scores."""
        direction = self.higher_is_better(metric)
        return self.title(metric) + ("" if direction is None else " ↑" if direction else " ↓")

    def better(self, metric: str) -> str:
        """``higher is better``, ``lower is better``, or nothing."""
        direction = self.higher_is_better(metric)
        return "" if direction is None else "higher is better" if direction else "lower is better"

    @cached_property
    def pair(self) -> tuple[str, str] | None:
        """The two variants whose maps are subtracted: those of ``difference``, else the baseline and the method."""
        if self.contents.difference is not None:
            return self.contents.difference
        there = set(self.contents.images[0].maps) if self.contents.images else set()
        base = [name for name in self.of_role("baseline") if name in there]
        method = [name for name in self.of_role("method") if name in there]
        return (base[0], method[0]) if base and method else None


def _likely_role(name: str) -> str:
    """The role of a variant that is not described, for the names that fastfg itself gives."""
    return {"vanilla": "baseline", "gated": "method"}.get(name, "other")
