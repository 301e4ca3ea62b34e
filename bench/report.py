"""Markdown tables from the lines that ``pytest bench/ --save`` has written: one table per shape, one row per provider.

``python -m bench.report`` prints them; ``--into docs/kernels.md`` rewrites the tables of a page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]

TEXTS = ("name", "provider", "dtype", "device", "commit", "date")
NUMBERS = ("median", "p20", "p80", "floor_ratio", "peak_bytes", "ratio")  # None where not measured
MARKED = re.compile(r"(<!-- bench:(\S+)((?: \S+=\S+)*) -->\n).*?(<!-- /bench -->)", re.DOTALL)
MISSING = "not measured"


def read_lines(root: Path) -> list[Line]:
    """The newest line per device, suite, provider, shape and dtype, from *.jsonl in ``root`` and its folders.

    Raises ValueError if there is no line, or if a line is not a benchmark result, with its file and line number.
    """
    newest: dict[tuple[str, ...], Line] = {}
    files = sorted([*root.glob("*.jsonl"), *root.glob("*/*.jsonl")])
    for file in files:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            line = _parse(text, f"{file}:{number}")
            key = (line["device"], line["name"], line["provider"], str(_case(line)))
            if key not in newest or line["date"] >= newest[key]["date"]:
                newest[key] = line  # replaces the older line, and keeps the order of the suite
    if not newest:
        raise ValueError(f"results: expected lines of `pytest bench/ --save` in {root}/*/*.jsonl, found none")
    return list(newest.values())


def _parse(text: str, where: str) -> Line:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got {text[:40]!r} ({error})") from None
    if not isinstance(line, dict):
        raise ValueError(f"{where}: expected a JSON object, got {text[:40]!r}")
    for key in TEXTS:
        if not isinstance(line.get(key), str):
            raise ValueError(f"{where}: expected {key!r} to be a string, got {line.get(key)!r}")
    if not isinstance(line.get("shape"), dict):
        raise ValueError(f"{where}: expected 'shape' to be an object, got {line.get('shape')!r}")
    for key in NUMBERS:
        if not isinstance(line.get(key), (int, float, type(None))):
            raise ValueError(f"{where}: expected {key!r} to be a number or null, got {line[key]!r}")
    return line


def report(lines: Iterable[Line]) -> str:
    """All lines, with one section per suite and device."""
    sections: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        sections.setdefault((line["name"], line["device"]), []).append(line)
    return "\n".join(f"## {name}, {device}\n\n{tables(group)}" for (name, device), group in sorted(sections.items()))


def summary(lines: Iterable[Line]) -> str:
    """One table with one row per case: fastfg's fastest backend, beside the fastest other implementation."""
    cases: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        cases.setdefault((line["name"], line["device"], _title(line)), []).append(line)
    rows = [
        "| suite | case | fastest | median | times as fast as | times its floor |",
        "| --- | --- | --- |" + " ---: |" * 3,
    ]
    for (name, _, case), group in cases.items():
        timed = sorted((line for line in group if line.get("median")), key=lambda line: line["median"])
        ours = next((line for line in timed if not line.get("bar")), None)
        if ours is None:
            continue
        best = next((line for line in timed if line.get("bar") == "whole"), None)
        faster = "" if best is None else f"{_digits(best['median'] / ours['median'])}x {best['provider']}"
        floor = "" if ours.get("floor_ratio") is None else f"{_digits(ours['floor_ratio'])}x"
        rows.append(f"| {name} | {case} | {ours['provider']} | {_seconds(ours['median'])} | {faster} | {floor} |")
    return "\n".join(rows) + "\n"


def tables(lines: list[Line]) -> str:
    """One suite on one device: one table per shape and dtype, each with a row for every provider of the suite."""
    providers = list(dict.fromkeys(line["provider"] for line in lines))
    cases: dict[str, list[Line]] = {}
    for line in lines:
        cases.setdefault(_title(line), []).append(line)
    return "\n".join(f"{title}:\n\n{_table(group, providers)}\n{_source(group)}\n" for title, group in cases.items())


def _table(lines: list[Line], providers: list[str]) -> str:
    """Rows in the order of ``providers``, without empty columns."""
    by_name = {line["provider"]: line for line in lines}
    columns: dict[str, dict[str, str]] = {"median (20-80%)": {n: _times(line) for n, line in by_name.items()}}
    for bar in ("whole", "part"):
        bars = [line for line in lines if line.get("bar") == bar and line.get("median")]
        if bars:
            best = min(bars, key=lambda line: line["median"])
            ratios = {n: best["median"] / line["median"] for n, line in by_name.items() if line.get("median")}
            columns[f"times as fast as {best['provider']}"] = {n: f"{_digits(r)}x" for n, r in ratios.items()}
    columns["times its floor"] = _column(by_name, "floor_ratio", lambda line: f"{_digits(line['floor_ratio'])}x")
    columns["takes, in turn"] = _column(by_name, "beside", lambda line: f"{line['ratio']:.2f}x {line['beside']}")
    columns["peak MiB"] = _column(by_name, "peak_bytes", lambda line: f"{line['peak_bytes'] / 2**20:.0f}")
    columns = {title: cells for title, cells in columns.items() if any(cells.values())}
    rows = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name in providers:
        cells = [column.get(name, "") for column in columns.values()]
        rows.append(f"| {name} | {' | '.join(cells) if name in by_name else MISSING + ' |' * len(cells[1:])} |")
    return "\n".join(rows) + "\n"


def _column(lines: Mapping[str, Line], key: str, show: Any) -> dict[str, str]:
    return {name: show(line) for name, line in lines.items() if line.get(key) is not None}


def _times(line: Line) -> str:
    if line.get("median") is None:
        return ""
    spread = "" if line.get("p20") is None else f" ({_seconds(line['p20'])} - {_seconds(line['p80'])})"
    return _seconds(line["median"]) + spread


def _seconds(value: float) -> str:
    size, unit = next((pair for pair in ((1.0, "s"), (1e-3, "ms")) if value >= pair[0]), (1e-6, "µs"))
    return f"{_digits(value / size)} {unit}"


def _digits(value: float) -> str:
    """``value`` with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _source(lines: list[Line]) -> str:
    """The devices, commits, dates and torch versions of the lines."""
    found = sorted({(line["date"][:10], line["commit"], str(line.get("torch")), line["device"]) for line in lines})
    return "; ".join(f"{device}, commit {commit}, {date}, torch {torch}" for date, commit, torch, device in found) + "."


def _case(line: Line) -> dict[str, str]:
    return {key: str(value) for key, value in {**line["shape"], "dtype": line["dtype"]}.items()}


def _title(line: Line) -> str:
    return ", ".join([*(f"{key}={value}" for key, value in line["shape"].items()), line["dtype"]])


def update(file: Path, lines: list[Line]) -> int:
    """Rewrite the tables between the markers in ``file``; returns the number of markers.

    A marker is ``<!-- bench:SUITE -->`` or ``<!-- bench:DEVICE/SUITE KEY=VALUE ... -->``. ``<!-- /bench -->`` ends its
    tables. KEY=VALUE selects shapes and dtypes. Raises ValueError for a marker without results.
    """
    text = file.read_text(encoding="utf-8")

    def rewritten(match: re.Match[str]) -> str:
        opening, name, conditions, closing = match.groups()
        device, _, suite = name.rpartition("/")
        wanted = dict(condition.split("=", 1) for condition in conditions.split())
        chosen = [line for line in lines if line["name"] == suite and device in ("", line["device"])]
        chosen = [line for line in chosen if wanted.items() <= _case(line).items()]
        if not chosen:
            raise ValueError(f"{file}: expected results for bench:{name}{conditions}, found none")
        by_device = dict.fromkeys(line["device"] for line in chosen)
        parts = [tables([line for line in chosen if line["device"] == device]) for device in by_device]
        return opening + "\n".join(parts) + closing

    updated, count = MARKED.subn(rewritten, text)
    if count != text.count("<!-- bench:"):
        raise ValueError(f"{file}: expected <!-- /bench --> after each <!-- bench:NAME -->, found {count}")
    if updated != text:
        file.write_text(updated, encoding="utf-8")
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m bench.report``; returns the exit code. An error is printed as one line, without a traceback."""
    parser = argparse.ArgumentParser("python -m bench.report", description="Make Markdown tables from results.")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of <device>/<suite>.jsonl")
    parser.add_argument("--out", type=Path, help="write the tables to this file, not to the screen")
    parser.add_argument("--short", action="store_true", help="print a single table with one row per case")
    parser.add_argument(
        "--into",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="rewrite the tables in these Markdown files, between <!-- bench:[DEVICE/]SUITE [KEY=VALUE ...] --> and "
        "<!-- /bench -->",
    )
    arguments = parser.parse_args(argv)
    try:
        _write(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _write(arguments: argparse.Namespace) -> None:
    lines = read_lines(arguments.results)
    text = summary(lines) if arguments.short else report(lines)
    for file in arguments.into:
        print(f"{file}: {update(file, lines)} tables up to date")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
        print(f"Wrote {arguments.out}")
    elif not arguments.into:
        print(text)


if __name__ == "__main__":
    sys.exit(main())
