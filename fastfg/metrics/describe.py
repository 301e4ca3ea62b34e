"""The facts of every metric as one table, which is also that of docs/metrics.md."""

from __future__ import annotations

from fastfg.metrics.choose import METRICS

COLUMNS = {
    "metric": "metric",
    "better": "better",
    "value_range": "range",
    "cost": "forwards per map",
    "source": "source",
    "failings": "known failings",
}


def table() -> list[dict[str, str]]:
    """One row per metric of fastfg: its name, direction, range, cost, source and known failings.

    >>> from fastfg.metrics import table
    >>> {row["metric"]: row["better"] for row in table()}["deletion"]
    'lower'
    """
    facts = ("value_range", "cost", "source", "failings")
    return [
        {"metric": name, "better": "higher" if metric.higher_is_better else "lower"}
        | {fact: getattr(metric, fact) for fact in facts}
        for name, metric in METRICS.items()
    ]


def markdown() -> str:
    """:func:`table` as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "| --- " * len(COLUMNS) + "|"]
    for row in table():
        cells = [f"`{row['metric']}`", *(row[fact].replace("|", "\\|") for fact in list(COLUMNS)[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
