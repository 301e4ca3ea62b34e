"""``fastfg evaluate`` by several processes that are killed at random moments, beside one process that is left alone.

    python -m bench.kills                      100 kills over 4 processes
    python -m bench.kills --kills 10           fewer
    python -m bench.kills --results DIR        also append a line to DIR/cpu/kills.jsonl

A round is one output folder. Processes run the same command on it. One of them gets SIGKILL after a random time, up to
twice the seconds of a batch, and then one to four processes go on. The table of each round must be equal to that of one
process, byte for byte: no image is missing, none is there twice. One of the files is damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results import append

MODEL, CLASSES, SIDE = "test_vit", 3, 64  # timm's own tiny ViT
PROCESSES = 4
KILLS_PER_ROUND = 25
FORKS = multiprocessing.get_context("forkserver")  # a fork of this process could hang in torch's threads


class WrongTableError(AssertionError):
    """A round's table differs from that of one process."""


def prepare(folder: Path, images: int) -> list[str]:
    """Write images and weights to ``folder``. Returns the command without its output folder."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from bench.photographs import photographs
    from fastfg.models.timm import import_timm

    torch.manual_seed(0)
    save_file(import_timm().create_model(MODEL, num_classes=CLASSES).state_dict(), folder / "vit.safetensors")
    (folder / "images").mkdir()
    pixels = (photographs(images, SIDE) * 0.25 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    for number, picture in enumerate((pixels * 255).to(torch.uint8).numpy()):
        Image.fromarray(picture).save(folder / "images" / f"{number:04d}.png")
    damaged = folder / "images" / f"{images // 2:04d}.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    command = ["evaluate", str(folder / "images"), "--model", MODEL, "--weights", str(folder / "vit.safetensors")]
    command += ["--metrics", "srg", "--methods", "random", "--patches-per-step", "25"]
    return [*command, "--batch-size", "2", "--out"]


def evaluate(command: list[str], log: str) -> None:
    """Run the command in a process of its own."""
    import torch

    from fastfg.cli import main

    torch.set_num_threads(1)
    with Path(log).open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(command)
    if code:
        raise SystemExit(code)


def start(command: list[str], log: Path) -> Any:
    process = FORKS.Process(target=evaluate, args=(command, str(log)))
    process.start()
    return process


def one_round(command: list[str], folder: Path, kills: int, batch: float, rng: random.Random) -> int:
    """Run the command on ``folder`` with up to ``kills`` kills. Returns how many there were."""
    log, done = folder.with_suffix(".log"), 0
    alive = [start([*command, str(folder)], log) for _ in range(PROCESSES)]
    while alive:
        time.sleep(rng.uniform(0, 2 * batch))
        for process in alive:
            if process.exitcode not in (None, 0):
                raise WrongTableError(f"a process ended with {process.exitcode}: {log.read_text()[-2000:]}")
        alive = [process for process in alive if process.is_alive()]
        if alive and done < kills:
            victim = alive.pop(rng.randrange(len(alive)))
            victim.kill()
            victim.join()
            done += victim.exitcode != 0  # 0: it had just ended
            wanted = rng.randint(max(1, len(alive)), PROCESSES)
            alive += [start([*command, str(folder)], log) for _ in range(wanted - len(alive))]
    return done


def check(folder: Path, whole: Path, images: int) -> None:
    """Raise WrongTableError unless both folders have the same tables, with every image once."""
    import pandas as pd

    table = pd.read_parquet(folder / "scores.parquet")
    counts = table.groupby("path")["variant"].apply(list)
    if len(counts) != images - 1 or any(variants != ["vanilla", "random"] for variants in counts):
        raise WrongTableError(f"{folder}: {len(counts)} images, of {images - 1}")
    for name in ("scores.parquet", "errors.parquet", "errors.csv", "table.md"):
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            raise WrongTableError(f"{folder / name} is not as that of one process")
    if left := [file.name for file in folder.rglob("*.tmp")]:
        raise WrongTableError(f"{folder}: left over: {left}")


def run(folder: Path, kills: int, images: int, seed: int = 0) -> dict[str, Any]:
    """Kill ``kills`` times, in as many rounds as it takes. Returns the figures."""
    rng, command = random.Random(seed), prepare(folder, images)
    FORKS.set_forkserver_preload(["bench.kills_imports"])
    whole = folder / "whole"
    begin = time.monotonic()
    alone = start([*command, str(whole)], folder / "whole.log")
    alone.join()
    seconds = time.monotonic() - begin
    if alone.exitcode:
        raise WrongTableError((folder / "whole.log").read_text()[-2000:])
    done = rounds = 0
    begin = time.monotonic()
    while done < kills:
        out = folder / f"round-{rounds}"
        done += one_round(command, out, min(KILLS_PER_ROUND, kills - done), 2 * seconds / images, rng)
        check(out, whole, images)
        rounds += 1
    return {"kills": done, "rounds": rounds, "images": images, "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, metavar="DIR", help="append a line to DIR/cpu/kills.jsonl")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), arguments.kills, arguments.images, arguments.seed)
    print("{kills} kills in {rounds} rounds of {images} images, {seconds} s: equal".format(**found))
    if arguments.results is not None:
        shape = {"kills": found["kills"], "images": found["images"], "processes": PROCESSES}
        line = {"name": "kills", "provider": "evaluate", "shape": shape, "dtype": "float32", "median": None}
        append(arguments.results, "cpu", line | found)


if __name__ == "__main__":
    main()
