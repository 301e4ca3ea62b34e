"""Things that several processes need are each made once, by processes that work side by side."""

import subprocess
import sys
import time

from fastfg.study.prepared import Once, Thing

PROCESS = """
import os, sys, time
from pathlib import Path
from fastfg.study.prepared import Once, Thing

out = Path(sys.argv[1])

def make(name):
    with (out / "made").open("a") as file:
        file.write(f"{name} {os.getpid()}\\n")
    time.sleep(0.5)
    (out / name).touch()

(out / f"waits-{os.getpid()}").touch()
while not (out / "go").exists():
    time.sleep(0.01)
Once(out, print)(*(Thing(n, (out / n).exists, lambda n=n: make(n)) for n in "abcd"))
assert all((out / name).exists() for name in "abcd")
"""


def test_two_processes_share_the_work(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)]) for _ in range(2)]
    while len(list(tmp_path.glob("waits-*"))) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in processes] == [0, 0]
    made = [line.split() for line in (tmp_path / "made").read_text().splitlines()]
    assert sorted(name for name, _ in made) == list("abcd")
    assert {int(pid) for _, pid in made} == {process.pid for process in processes}


def test_what_is_there_is_not_made_again(tmp_path):
    made = []
    things = [
        Thing("a", lambda: True, lambda: made.append("a")),
        Thing("b", lambda: "b" in made, lambda: made.append("b")),
    ]
    Once(tmp_path, print)(*things)
    assert made == ["b"]
