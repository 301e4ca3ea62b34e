"""The choice of a kernel's tiles, with a fake clock and a fake GPU."""

from __future__ import annotations

import json
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastfg.kernels import encode_project, encode_topk, gated_relevancy, project, relevancy, tuning

CARD = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.bfloat16)
FIRST, FASTEST, ELSEWHERE = {"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 3, "cards": (8,)}
KEY = "op, H100, bfloat16, 256, 64"


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The timed runs. FASTEST is the fastest configuration here; ELSEWHERE would be the fastest on other GPUs."""
    runs = []
    monkeypatch.setenv("FASTFG_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "device", lambda where: ("H100", 9))
    monkeypatch.setattr(tuning, "seconds", lambda run: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.kept.cache_clear()

    def choose(mode, sizes=(200, 64), like=CARD, candidates=(FIRST, FASTEST, ELSEWHERE)):
        monkeypatch.setenv("FASTFG_TUNE", mode)
        tuning.kept.cache_clear()  # as in another process

        def run(config):
            runs.append(config)
            return -config["BLOCK"]

        return tuning.choose("op", like, sizes, list(candidates), run)

    yield SimpleNamespace(choose=choose, runs=runs, file=tmp_path / "tuned.json")
    tuning.kept.cache_clear()


@pytest.mark.parametrize("mode", ["", "0", "cached"])
def test_nothing_is_timed_unless_asked_for(mode, timed):
    assert timed.choose(mode) == FIRST
    assert not timed.runs
    assert not timed.file.exists()


def test_a_search_is_made_once_and_kept(timed):
    assert timed.choose("1") == FASTEST
    assert timed.runs == [FIRST, FASTEST]
    assert json.loads(timed.file.read_text()) == {KEY: FASTEST}
    assert timed.choose("1", sizes=(129, 33)) == FASTEST  # of the same powers of two
    assert timed.choose("cached") == FASTEST
    assert timed.choose("0") == FIRST
    assert len(timed.runs) == 2
    timed.choose("1", sizes=(100, 64))
    assert len(timed.runs) == 4
    assert len(json.loads(timed.file.read_text())) == 2


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_an_unreadable_file_is_named_and_replaced(text, timed):
    timed.file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"tuned.json: not used, and written anew by FASTFG_TUNE=1"):
        assert timed.choose("cached") == FIRST
    with pytest.warns(UserWarning, match="not used"):
        assert timed.choose("1") == FASTEST
    assert json.loads(timed.file.read_text()) == {KEY: FASTEST}


def test_a_stored_choice_that_is_no_longer_a_candidate(timed):
    timed.file.write_text(json.dumps({KEY: {"BLOCK": 512}, "other": FIRST}))
    assert timed.choose("cached") == FIRST
    assert timed.choose("1") == FASTEST
    assert json.loads(timed.file.read_text()) == {KEY: FASTEST, "other": FIRST}


def test_the_committed_choice_is_the_default(timed, monkeypatch):
    monkeypatch.setitem(tuning.FIXED, "op, H100, bfloat16", FASTEST)
    assert timed.choose("0") == FASTEST
    assert timed.choose("cached") == FASTEST
    monkeypatch.setitem(tuning.FIXED, "op, H100, bfloat16", {"BLOCK": 3})
    assert timed.choose("0") == FIRST


def test_nothing_is_timed_off_a_card_or_while_a_graph_is_captured(timed, monkeypatch):
    assert timed.choose("1", like=torch.zeros(1)) == FIRST
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert timed.choose("1") == FIRST
    assert not timed.runs


def test_threads_may_keep_their_choices_at_once(timed):
    """Nothing is lost, and a reader always finds a complete file."""
    together, wrong = threading.Barrier(9), []

    def use(work):
        try:
            together.wait()
            work()
        except BaseException as error:
            wrong.append(error)

    def write(name):
        for n in range(20):
            tuning.keep(timed.file, f"{name}, {n}", {"BLOCK": n})

    def read():
        for _ in range(200):
            if timed.file.exists():
                json.loads(timed.file.read_text())

    threads = [threading.Thread(target=use, args=(partial(write, name),)) for name in range(8)]
    threads.append(threading.Thread(target=use, args=(read,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert json.loads(timed.file.read_text()) == {f"{name}, {n}": {"BLOCK": n} for name in range(8) for n in range(20)}
    assert list(timed.file.parent.iterdir()) == [timed.file]


def test_an_unknown_mode_is_named(timed):
    with pytest.raises(ValueError, match=r"FASTFG_TUNE: expected one of \('0', '1', 'cached'\), got 'yes'"):
        timed.choose("yes")


def test_committed_choices_are_candidates():
    modules = (encode_project, encode_topk, project)
    offers = [config for module in modules for config in module.HALF + module.SINGLE]
    offers += (
        encode_topk.BULK
        + relevancy.EXACT
        + relevancy.EXACT_WIDE
        + relevancy.ONE_ROW
        + relevancy.ROWS
        + relevancy.LOG_SUM_EXP
    )
    offers += gated_relevancy.EXACT + gated_relevancy.ONE_ROW + gated_relevancy.ROWS
    assert all(config in tuning.offered(offers) for config in tuning.FIXED.values())
