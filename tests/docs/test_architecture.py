"""ARCHITECTURE.md shows the import rules that ``tests/test_imports.py`` enforces, and names files that exist."""

import re
from pathlib import Path

from tests.test_imports import ALLOWED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
RULES = {room: allowed - ({"attribution"} if room == "models" else set()) for room, allowed in ALLOWED.items()}


def reachable(room):
    return RULES[room].union(*map(reachable, RULES[room]))


def test_the_table_is_the_rules():
    found = {}
    table = PAGE[PAGE.index("The full list:") :]
    for rooms, allowed in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", table, re.MULTILINE):
        for room in re.findall(r"`(\w+)`", rooms):
            found[room] = set(re.findall(r"`(\w+)`", allowed))
    assert found == RULES


def test_the_diagram_has_every_arrow_that_does_not_follow_from_others():
    arrows = set(re.findall(r"^ +(\w+) --> (\w+)$", PAGE, re.MULTILINE))
    needed = {
        (room, other)
        for room, allowed in RULES.items()
        for other in allowed
        if not any(other in reachable(between) for between in allowed - {other})
    }
    assert arrows == needed


def test_files_and_links_exist():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/notes/*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page} links to {target}"
        for name in re.findall(r"`((?:fastfg|tests|bench|docs|csrc|kernels)/[\w./-]+)`", text):
            if "scale" not in name:  # the op that CONTRIBUTING.md adds
                assert (ROOT / name).exists(), f"{page} names {name}"
    for name in re.findall(r"`((?:attribution|metrics|models|perturb|ops|study|reference)/\w+\.py)`", PAGE):
        assert (ROOT / "fastfg" / name).exists(), f"ARCHITECTURE.md names {name}"
