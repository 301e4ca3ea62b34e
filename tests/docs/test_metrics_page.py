"""docs/metrics.md: its table is the one in code, its example runs, and every metric is in it."""

from pathlib import Path

from fastfg.metrics.describe import markdown, table
from tests.docs.blocks import run_blocks

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
COMMAND = 'python -c "from fastfg.metrics.describe import markdown; print(markdown())"'
START, END = f"<!-- {COMMAND} -->\n\n", "\n<!-- end -->"


def test_the_table_is_generated():
    text = PAGE.read_text(encoding="utf-8")
    shown = text[text.index(START) + len(START) : text.index(END)]
    assert shown == markdown(), f"run {COMMAND} and put its output between the two comments"


def test_every_row_is_complete():
    for row in table():
        assert all(row.values()), row
        assert row["better"] in ("higher", "lower")


def test_the_example_runs():
    page = run_blocks(PAGE)
    assert page["scores"].errors == []
    assert page["scores"].details["deletion"]["curve"].shape == (2, 17)
