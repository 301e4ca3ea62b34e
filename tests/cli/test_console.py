"""Progress, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from fastfg.cli import console


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    time = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: time[0])
    return time


def test_progress_in_a_log(clock, capsys):
    with console.tracker() as track:
        progress = track("Judging 300 images")
        for seconds, done in [(5, 60), (10, 70), (34, 118), (36, 120), (66, 180), (126, 300), (127, 300)]:
            clock[0] = seconds
            progress(done, 300)
    assert capsys.readouterr().out.splitlines() == [
        "Judging 300 images: 60 of 300",  # of an earlier run: these do not count for the rate
        "Judging 300 images: 120 of 300, 1.94 per second, 0:01:33 left",
        "Judging 300 images: 180 of 300, 1.97 per second, 0:01:01 left",
        "Judging 300 images: 300 of 300 in 0:02:06, 1.98 per second",
    ]


def test_nothing_left_to_do(clock, capsys):
    with console.tracker() as track:
        track("Judging 300 images")(300, 300)
    assert capsys.readouterr().out == "Judging 300 images: 300 of 300 in 0:00:00\n"


def test_progress_on_a_terminal(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "console", terminal)
    with console.tracker() as track:
        progress = track("Judging [300] images")
        for done in (60, 61, 62, 300):
            progress(done, 300)
    shown = terminal.file.getvalue()
    assert "Judging [300] images" in shown
    assert "300/300" in shown
    assert "/s" in shown
