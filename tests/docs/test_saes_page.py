"""docs/saes.md has every format and every override."""

from pathlib import Path

import fastfg
from fastfg.sae.formats import FORMATS
from fastfg.sae.formats.common import OVERRIDES

PAGE = (Path(__file__).parents[2] / "docs" / "saes.md").read_text(encoding="utf-8")


def test_the_table_has_every_format():
    formats = PAGE.split("## Formats")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in formats.splitlines() if line.startswith("| ")]
    assert rows[0] == "format"
    assert rows[2:] == sorted(rows[2:], key=[form.NAME for form in FORMATS].index)
    assert set(rows[2:]) == {form.NAME for form in FORMATS if form.FILES}


def test_every_override_is_explained():
    for name in OVERRIDES:
        assert f"``{name}``" in (fastfg.load_saes.__doc__ or "")
