"""``fastfg.ray`` in an actor of Ray Data beside a plain loop over the same batches, in turn.

    python -m bench.ray_data                   the ratio of their times per batch
    python -m bench.ray_data --results DIR     also append a line to DIR/cpu/ray_data.jsonl

Both call the same object. Times are from the end of the first batch to the end of the last one, so that the start of
the actor and of the model is left out: wall time, with all that the actor waits for, and the processor time of its
process, which depends less on what else the machine runs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.results import append
from fastfg.ray import Explain

MODEL, SIDE, BATCH = "vit_tiny_patch16_224", 224, 8


def make() -> Any:
    from fastfg.models import load

    torch.set_num_threads(1)
    return load(MODEL, pretrained=False, num_classes=10)[0]


class Timed(Explain):
    """Also says when each batch was finished: by the clock, and by the process's processor time."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        found = super().__call__(batch)
        n = len(found["error"])
        return found | {"wall": np.full(n, time.monotonic()), "processor": np.full(n, time.process_time())}


def per_batch(walls: Any, processors: Any) -> np.ndarray[Any, Any]:
    """Seconds per batch: wall and processor."""
    ends = np.array([np.unique(walls), np.unique(processors)])
    return (ends[:, -1] - ends[:, 0]) / (ends.shape[1] - 1)


def in_ray(ray: Any, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rows = [{"id": n, "image": image} for n, image in enumerate(images)]
    data = ray.data.from_items(rows, override_num_blocks=1).map_batches(
        Timed,
        fn_constructor_kwargs={"model": make},
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    table = data.select_columns(["id", "wall", "processor"]).to_pandas()
    if sorted(table["id"]) != list(range(len(images))):
        raise AssertionError("Ray Data did not return each image once")
    return per_batch(table["wall"], table["processor"])


def in_a_loop(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    timed = Timed(make)
    found = [timed({"id": range(BATCH), "image": batch}) for batch in images.reshape(-1, BATCH, *images.shape[1:])]
    return per_batch(*([batch[name][0] for batch in found] for name in ("wall", "processor")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, metavar="DIR", help="append a line to DIR/cpu/ray_data.jsonl")
    arguments = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else the actor waits for every other process of the machine
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    images = np.random.default_rng(0).integers(0, 255, (arguments.batches * BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    both = []
    for _ in range(arguments.rounds):
        both.append((in_ray(ray, images), in_a_loop(images)))
        print("seconds per batch, wall and processor: Ray Data {}, loop {}".format(*both[-1]), flush=True)
    ray.shutdown()
    found = figures(both)
    print("Ray Data over loop: {ratio:.3f} by wall time, {processor ratio:.3f} by processor time".format_map(found))
    if arguments.results is not None:
        shape = {"model": MODEL, "batch": BATCH, "batches": arguments.batches}
        line = {"name": "ray_data", "provider": "Explain", "shape": shape, "dtype": "float32"}
        append(arguments.results, "cpu", line | found)


def figures(both: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """Medians over rounds of (wall, processor) seconds per batch in Ray Data and in the loop, and of their ratios."""
    ray, loop = np.array(both).transpose(1, 2, 0)
    times = {"median": ray[0], "loop": loop[0], "processor": ray[1], "loop processor": loop[1]}
    ratios = {"ratio": ray[0] / loop[0], "processor ratio": ray[1] / loop[1]}
    return {name: float(np.median(values)) for name, values in (times | ratios).items()} | {"rounds": len(both)}


if __name__ == "__main__":
    main()
