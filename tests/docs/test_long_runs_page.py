"""The Python example of docs/long_runs.md prints what the page says."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "long_runs.md").read_text(encoding="utf-8")


def test_the_example_prints_what_the_page_says(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/long_runs.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.findall(r"print.*# (.*)", code)[0]
