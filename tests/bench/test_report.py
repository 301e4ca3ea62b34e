"""``python -m bench.report`` on a made-up folder of results."""

import json

import pytest

from bench.report import main

LINE = {
    "name": "project",
    "provider": "cpp",
    "bar": None,
    "shape": {"B": 2, "P": 196},
    "dtype": "float32",
    "median": 0.008,
    "p20": 0.0075,
    "p80": 0.0091,
    "rounds": 9,
    "peak_bytes": 2**21,
    "floor_ratio": 1.25,
    "commit": "abc1234",
    "device": "cpu",
    "torch": "2.13.0",
    "date": "2026-01-02T03:04:05+00:00",
}


def write(folder, *lines, device="cpu", suite="project"):
    (folder / device).mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(LINE | line)) + "\n" for line in lines)
    (folder / device / f"{suite}.jsonl").write_text(text)


@pytest.fixture
def results(tmp_path):
    """Two shapes on a CPU, one of them measured twice, and one shape on a GPU."""
    folder = tmp_path / "results"
    write(
        folder,
        {"median": 5.0, "commit": "older", "date": "2026-01-01T00:00:00+00:00"},
        {},
        {"provider": "dense", "bar": "whole", "median": 0.4, "floor_ratio": 60, "peak_bytes": None},
        {"provider": "bag", "bar": "whole", "median": 0.016, "floor_ratio": 2, "peak_bytes": None},
        {"provider": "one GEMM", "bar": "part", "median": 0.004, "floor_ratio": None, "peak_bytes": None},
        {"shape": {"B": 8, "P": 196}, "median": 1.5, "ratio": 1.06, "beside": "own", "peak_bytes": None},
    )
    write(folder, {"device": "Card-1", "median": 3e-5, "p20": None, "p80": None}, device="Card-1")
    return folder


def test_tables(results, tmp_path, capsys):
    out = tmp_path / "new" / "report.md"
    assert main(["--results", str(results), "--out", str(out)]) == 0
    text = out.read_text()
    assert text.index("## project, Card-1") < text.index("## project, cpu")
    assert "B=2, P=196, float32:" in text
    assert (
        "| | median (20-80%) | times as fast as bag | times as fast as one GEMM | times its floor | peak MiB |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| cpp | 8 ms (7.5 ms - 9.1 ms) | 2x | 0.5x | 1.25x | 2 |\n"
        "| dense | 400 ms (7.5 ms - 9.1 ms) | 0.04x | 0.01x | 60x |  |\n"
    ) in text
    assert "| cpp | 1.5 s (7.5 ms - 9.1 ms) | 1.25x | 1.06x own |\n| dense | not measured | | |\n" in text
    assert "| cpp | 30 µs | 1.25x | 2 |" in text
    assert "cpu, commit abc1234, 2026-01-02, torch 2.13.0." in text
    assert "older" not in text
    assert main(["--results", str(results / "cpu")]) == 0  # one device's own folder
    assert "| bag | 16 ms" in capsys.readouterr().out


def test_short(results, capsys):
    """Other implementations and older lines have no row of their own, and a case without times has no row."""
    write(results, {"median": None, "peak_bytes": 1}, suite="memory")
    assert main(["--short", "--results", str(results)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[2:] == [
        "| project | B=2, P=196, float32 | cpp | 30 µs |  | 1.25x |",
        "| project | B=2, P=196, float32 | cpp | 8 ms | 2x bag | 1.25x |",
        "| project | B=8, P=196, float32 | cpp | 1.5 s |  | 1.25x |",
    ]


def test_into_markdown(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Before\n<!-- bench:project -->\nold\n<!-- /bench -->\nbetween\n"
        "<!-- bench:cpu/project B=8 dtype=float32 -->\n<!-- /bench -->\nafter\n"
    )
    for _ in range(2):  # a second time changes nothing
        assert main(["--results", str(results), "--into", str(page)]) == 0
        text = page.read_text()
        everything, one = text.split("between")
        assert "old" not in everything
        assert everything.count("B=2, P=196") == 2  # on either device
        assert one.count("| cpp |") == 1
        assert "B=8, P=196" in one
        assert text.startswith("Before\n<!-- bench:project -->\nB=2")
        assert text.endswith("<!-- /bench -->\nafter\n")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- bench:gate -->\n<!-- /bench -->\n", "expected results for bench:gate, found none"),
        ("<!-- bench:cpu/project B=3 -->\n<!-- /bench -->\n", "expected results for bench:cpu/project B=3, found none"),
        ("<!-- bench:project -->\n", "expected <!-- /bench --> after each <!-- bench:NAME -->, found 0"),
    ],
)
def test_markers_that_find_nothing(results, tmp_path, capsys, page, message):
    file = tmp_path / "page.md"
    file.write_text(page)
    assert main(["--results", str(results), "--into", str(file)]) == 1
    assert message in capsys.readouterr().err
    assert file.read_text() == page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "cpu/project.jsonl:2: expected a JSON object, got '{nonsense'"),
        ("", "cpu/project.jsonl:2: expected a JSON object, got ''"),
        ("[1]", "cpu/project.jsonl:2: expected a JSON object, got '[1]'"),
        ({"shape": "B=2"}, "cpu/project.jsonl:2: expected 'shape' to be an object, got 'B=2'"),
        ({"provider": None}, "cpu/project.jsonl:2: expected 'provider' to be a string, got None"),
        ({"median": "fast"}, "cpu/project.jsonl:2: expected 'median' to be a number or null, got 'fast'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, capsys, line, message):
    write(tmp_path, {}, line)
    assert main(["--results", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_an_empty_folder(tmp_path, capsys):
    assert main(["--results", str(tmp_path)]) == 1
    assert "error: results: expected lines of `pytest bench/ --save` in" in capsys.readouterr().err
